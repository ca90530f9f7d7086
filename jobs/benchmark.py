"""`raydistill benchmark` as a script: measure the system on this machine."""

import sys

from raydistill.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
