"""Average one-step students that were distilled from different teachers into one: same size, same cost.

Each STUDENT is an export's folder, the name or folder of a run, or an MLflow run id. All must be of one family: the
same network, VAE, text encoder, scheduler and start timestep; the first tensor that differs is named. Weights are
averaged in float64, tensor by tensor, so that memory does not grow with the model. The new folder is an ordinary
diffusers pipeline in the first student's precision; its model card names every source, weight, teacher and licence.

Exit code 2: wrong input, nothing was written.
"""

from __future__ import annotations

import argparse

from raydistill.export.command_line import STUDENT_HELP, add_tracking_uri, parser_of, report_error
from raydistill.storage.atomic import writing
from raydistill.storage.resolve import place_argument

EXAMPLES = """examples:
  raydistill merge from-sdxl from-flux from-sd35 --out outputs/merged
  raydistill merge from-sdxl from-flux --weights 1 3 --out outputs/merged
  raydistill sample outputs/merged --prompt "a red circle"
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("students", nargs="+", metavar="STUDENT", help=STUDENT_HELP)
    add("--weights", type=float, nargs="+", metavar="W", help="one positive number a student, in the same order; they "
        "are scaled to the sum 1 (default: all equal)")
    add("--out", type=place_argument, required=True, metavar="FOLDER", help="folder or URI to write; must not exist")
    # fmt: on
    add_tracking_uri(parser)
    return parser.parse_args(argv)


def main() -> int:
    arguments = arguments_of()
    # after the command line is known to be right: torch takes seconds
    from tqdm import tqdm

    # likewise
    from raydistill.export.merge import check_target, merge_students, open_sources, shares_of
    from raydistill.export.pipeline import how_to_draw
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
    except (ValueError, OSError) as error:
        return report_error(error)
    print(f"pipeline  {arguments.out}")
    print(f"draw it   {how_to_draw(arguments.out)}")
    print(f"card      {arguments.out / 'README.md'}")
    return 0
