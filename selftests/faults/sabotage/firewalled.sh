#!/bin/sh
# Load the nft rules in $SABOTAGE in the birth namespace of the program, then become the program.
printf "%s" "$SABOTAGE" | nft -f - && exec "$SABOTAGED_PROGRAM" "$@"
