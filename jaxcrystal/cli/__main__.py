"""`python -m jaxcrystal.cli`, where the command is not installed."""

import sys

from jaxcrystal.cli import main

if __name__ == "__main__":
    sys.exit(main())
