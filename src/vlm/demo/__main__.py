"""`python -m vlm.demo`: runs `vlm.demo.main`."""

import signal
import sys

from vlm.demo.main import main

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # between the stages, which save a checkpoint and end by themselves
        sys.exit(128 + signal.SIGINT)
