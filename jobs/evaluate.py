"""`raydistill evaluate` as a script: draw the pictures of a prompt set and score them."""

import sys

from raydistill.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
