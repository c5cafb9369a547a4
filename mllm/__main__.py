"""`python -m mllm`: the same as the command `mllm`."""

import sys

from mllm_cli import main

if __name__ == "__main__":
    sys.exit(main())
