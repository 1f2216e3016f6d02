"""Run the command `wg-interop` as `python -m harness`."""

from harness.cli.commands import main

if __name__ == "__main__":
    main()
