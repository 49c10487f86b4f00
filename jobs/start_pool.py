"""Start a detached pool: `ray job submit --working-dir jobs -- python start_pool.py --devices host:2x512MiB`."""

import sys

from kvpool.cli import main

if __name__ == "__main__":
    main(["start", *sys.argv[1:]])
