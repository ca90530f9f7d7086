"""`raydistill synthesize` as a script: make latent pairs, or encode real images."""

import sys

from raydistill.commands.synthesize import main

if __name__ == "__main__":
    sys.exit(main())
