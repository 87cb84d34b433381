"""`python -m codmd`: the `codmd` command."""

import sys

from codmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
