"""`raydistill train-bridge` as a script: train the Bridge alone, or ablate it."""

import sys

from raydistill.commands.train_bridge import main

if __name__ == "__main__":
    sys.exit(main())
