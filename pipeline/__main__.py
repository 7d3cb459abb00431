"""python -m pipeline"""

import signal
import sys

from pipeline.cli import main

if __name__ == "__main__":
    # a cluster or a person asks us to stop: unwind, so that temporaries and child processes go with us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
