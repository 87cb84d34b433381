"""``python -m benchmarks.latency``: see :mod:`benchmarks.latency.table`."""

import sys

from benchmarks.latency.table import main

if __name__ == "__main__":
    sys.exit(main())
