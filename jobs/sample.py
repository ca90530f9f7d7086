"""`raydistill sample` as a script: draw pictures with an exported student."""

import sys

from raydistill.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
