"""`raydistill distill` as a script: distil a one-step student."""

import sys

from raydistill.commands.distill import main

if __name__ == "__main__":
    sys.exit(main())
