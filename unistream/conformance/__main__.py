"""`python -m unistream.conformance`: see `command`."""

import sys

from unistream.conformance.command import main

if __name__ == "__main__":
    sys.exit(main())
