"""`raydistill export` as a script: the student in the forms that other tools read."""

import sys

from raydistill.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
