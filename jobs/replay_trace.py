"""The main job: `ray job submit --working-dir jobs -- python replay_trace.py --trace FILE`."""

import sys

from kvpool.cli import main

if __name__ == "__main__":
    main(["replay", *sys.argv[1:]])
