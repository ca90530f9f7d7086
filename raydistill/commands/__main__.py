"""`python -m raydistill.commands NAME …`: the console command where it is not on the path."""

import sys

from raydistill.commands import main

if __name__ == "__main__":
    sys.exit(main())
