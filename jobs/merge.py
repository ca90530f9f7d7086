"""Average one-step students that were distilled from different teachers into one: same size, same cost.

Each STUDENT is an export's folder, the name or folder of a run, or an MLflow run id. All must be of one family: the
same network, VAE, text encoder, scheduler and start timestep; the first tensor that differs is named. Weights are
averaged in float64, tensor by tensor, so that memory does not grow with the model. The new folder is an ordinary
diffusers pipeline in the first student's precision; its model card names every source, weight, teacher and licence.

Exit code 2: wrong input, nothing was written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from raydistill.storage.atomic import writing
from raydistill.storage.resolve import place_argument

EXAMPLES = """examples:
  python jobs/merge.py from-sdxl from-flux from-sd35 --out outputs/merged
  python jobs/merge.py from-sdxl from-flux --weights 1 3 --out outputs/merged
  python jobs/sample.py outputs/merged --prompt "a red circle"
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("students", nargs="+", metavar="STUDENT", help="export's folder, run's name or folder, URI of one, or MLflow run id")  # fmt: skip
    add("--weights", type=float, nargs="+", metavar="W", help="one positive number a student, in the same order; they "
        "are scaled to the sum 1 (default: all equal)")  # fmt: skip
    add("--out", type=place_argument, required=True, metavar="FOLDER", help="folder or URI to write; must not exist")
    add(
        "--storage",
        type=place_argument,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where runs are (default: outputs)",
    )
    add("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), metavar="URI",
        help="MLflow, for a run id that is not in storage (default: $MLFLOW_TRACKING_URI)")  # fmt: skip
    return parser.parse_args(argv)


def main() -> int:
    arguments = arguments_of()
    from tqdm import tqdm

    from raydistill.export.merge import check_target, merge_students, open_sources, shares_of
    from raydistill.export.source import find_export

    try:
        check_target(arguments.out)
        shares = shares_of(arguments.weights, len(arguments.students))
        exports = [find_export(text, arguments.storage, arguments.tracking_uri) for text in arguments.students]
        sources = open_sources(exports)
        for source, share in zip(sources, shares, strict=True):
            print(f"source    {share:.4f}  {source.export.folder}")
        bar = tqdm(total=len(sources[0].tensors), desc="merge", unit="tensor", disable=None)
        with bar, writing(arguments.out) as folder:
            merge_students(sources, shares, folder, bar.update)
    except (ValueError, OSError) as error:  # every input error of the project is a ValueError, and says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"pipeline  {arguments.out}  (num_inference_steps=1, guidance_scale=0)")
    print(f"card      {arguments.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
