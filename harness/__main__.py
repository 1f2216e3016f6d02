"""`python -m harness` is `wg-interop`."""

from harness.cli import main

if __name__ == "__main__":
    main()
