"""`raydistill build-shapes` as a script: train the miniature world anew."""

import sys

from raydistill.commands.build_shapes import main

if __name__ == "__main__":
    sys.exit(main())
