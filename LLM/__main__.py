"""`python -m LLM`."""

import signal
import sys

from LLM.cli import main

if __name__ == "__main__":
    code = main()
    if code == 130:  # a second Ctrl-C while Python ends would change it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
