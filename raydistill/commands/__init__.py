"""The commands of `raydistill NAME …`; `jobs/NAME.py` are the same. One module a command, whose `main()` reads sys.argv.

Nothing heavy is imported here: the list of commands is quick.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import raydistill

COMMANDS = {  # name -> purpose; the module is the name with underscores
    "distill": "distil a one-step student",
    "plan": "what fits on which GPU, hours and price; starts nothing",
    "synthesize": "make latent pairs, or encode real images",
    "train-bridge": "train the Bridge alone, or ablate it",
    "evaluate": "draw the pictures of a prompt set and score them",
    "sample": "draw pictures with an exported student",
    "merge": "average students",
    "assemble": "put a step-distilled network or LoRA into a base model's pipeline",
    "export": "write a student as one file, LoRA, ONNX or OpenVINO, or push it to the hub",
    "benchmark": "measure the system on this machine",
    "reproduce": "the paper's tables in miniature",
    "build-shapes": "train the miniature world anew",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = (f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return "\n".join(
        (
            "usage: raydistill COMMAND [arguments]    `raydistill COMMAND --help` lists them",
            "       raydistill --version",
            "",
            "commands:",
            *rows,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command `raydistill`; returns the exit code, 2 for an unknown command."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"raydistill {raydistill.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [str(Path(sys.argv[0]).with_name(f"raydistill {name}")), *rest]  # argparse shows the last part
    return importlib.import_module(f"raydistill.commands.{name.replace('-', '_')}").main()
