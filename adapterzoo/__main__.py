"""`python -m adapterzoo COMMAND`."""

import sys

from adapterzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
