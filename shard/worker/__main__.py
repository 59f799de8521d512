"""`python -P -m shard.worker` is the worker process."""

import sys

from shard.worker.process import main

if __name__ == "__main__":
    sys.exit(main())
