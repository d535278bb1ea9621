"""`python -m jint8`."""

import sys

from jint8.cli import main

if __name__ == "__main__":
    sys.exit(main())
