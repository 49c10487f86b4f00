"""Delete a pool: `ray job submit --working-dir jobs -- python stop_pool.py --name kvpool --drain 10`."""

import sys

from kvpool.cli import main

if __name__ == "__main__":
    main(["stop", *sys.argv[1:]])
