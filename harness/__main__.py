"""`python -m harness` is `wg-interop`."""

from harness.cli.commands import main

if __name__ == "__main__":
    main()
