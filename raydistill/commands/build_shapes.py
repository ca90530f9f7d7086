"""Train the embedded miniature world (judge, text encoders, VAEs, teacher, weak student and its one-step start,
teacher samples, Bridge) and write it into raydistill/shapes/weights. Seeded; finished stages are skipped and an
interrupted one goes on. Two processes with different --stages may run side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from raydistill.build_shapes import STAGES, run_stages
from raydistill.build_shapes.frame import Build
from raydistill.shapes import WEIGHTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to build")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where finished models go")
    parser.add_argument("--work", type=Path, default=Path("outputs/build"), help="training states and cached latents")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps; 0.01 tries the whole path")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_stages(Build(arguments.work, arguments.weights, arguments.seed, arguments.scale), arguments.stages)
    return 0
