"""`raydistill assemble` as a script: a step-distilled pipeline."""

import sys

from raydistill.commands.assemble import main

if __name__ == "__main__":
    sys.exit(main())
