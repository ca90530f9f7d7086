"""`raydistill plan` as a script: what fits on which GPU, hours and price; starts nothing."""

import sys

from raydistill.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
