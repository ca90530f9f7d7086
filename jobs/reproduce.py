"""`raydistill reproduce` as a script: the paper's tables in miniature."""

import sys

from raydistill.commands.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
