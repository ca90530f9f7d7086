"""`raydistill merge` as a script: average students."""

import sys

from raydistill.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
