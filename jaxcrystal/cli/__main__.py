"""`python -m jaxcrystal.cli`, where the command is not installed."""

import sys

from jaxcrystal.cli import main

sys.exit(main())
