#!/bin/sh
# A saboteur: loads the nft rules in $SABOTAGE where the program is born, then becomes the program.
printf "%s" "$SABOTAGE" | nft -f - && exec "$SABOTAGED_PROGRAM" "$@"
