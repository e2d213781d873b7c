"""`python -m LLM`."""

import sys

from LLM.cli import main

if __name__ == "__main__":
    sys.exit(main())
