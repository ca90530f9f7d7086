"""Write a one-step student in the form that other tools read, or push it to the hub.

STUDENT is an export's folder, the name or folder of a run, or an MLflow run id. The pipeline folder in <run>/export is
what diffusers reads; this job makes other forms of it:

  single-file   one safetensors in Stable Diffusion's original layout, with a ComfyUI workflow
  lora          the difference to the base model, for load_lora_weights
  onnx          ONNX Runtime, through optimum in an environment of its own
  openvino      OpenVINO, likewise
  hub           the pipeline folder in a repository of the Hugging Face hub, private unless --public

Every written form is loaded and draws one picture, which is compared with the pipeline folder's own. The student draws
with 1 step and guidance off, in every tool.

Exit code 2: wrong input, nothing was written.
"""

from __future__ import annotations

import argparse

from raydistill.export.command_line import STUDENT_HELP, add_tracking_uri, parser_of, report_error
from raydistill.storage.resolve import place_argument

FORMATS = ("single-file", "lora", "onnx", "openvino", "hub")
BELONGS = {
    "base": ("lora",),
    "energy": ("lora",),
    "repo": ("hub",),
    "public": ("hub",),
    "optimum": ("onnx", "openvino"),
}
EXAMPLES = """examples:
  raydistill export mine --format single-file
  raydistill export mine --format lora --energy 0.999 --out outputs/mine-lora
  raydistill export mine --format onnx --optimum optimum-onnx/bin/python
  raydistill export mine --format hub --repo me/one-step-student
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("student", metavar="STUDENT", help=STUDENT_HELP)
    add("--format", required=True, choices=FORMATS, help="what to write")
    add("--out", type=place_argument, metavar="FOLDER", help="folder or URI to write; must not exist (default: "
        "<run>/<format>)")
    add("--base", metavar="MODEL", help="lora: the base model, a folder or hub id (default: the run's student.model)")
    add("--energy", type=_share, metavar="E", help="lora: share of every layer's squared difference that its rank "
        "keeps (default: 0.99)")
    add("--optimum", metavar="PYTHON", help="onnx, openvino: the Python of an environment that has optimum")
    add("--repo", metavar="ORG/NAME", help="hub: the repository; is made where it is missing")
    add("--public", action="store_true", default=None, help="hub: make a new repository public")
    # fmt: on
    add_tracking_uri(parser)
    arguments = parser.parse_args(argv)
    for option, formats in BELONGS.items():
        if getattr(arguments, option) is not None and arguments.format not in formats:
            parser.error(f"--{option} belongs to --format {' or '.join(formats)}")
    if arguments.format == "hub" and arguments.out is not None:
        parser.error("--out: --format hub writes to --repo alone")
    return arguments


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 and at most 1 is needed")
    return value


def main() -> int:
    arguments = arguments_of()
    # after the command line is known to be right: torch takes seconds
    from raydistill.export.optimum import check_environment
    from raydistill.export.push import check_repository
    from raydistill.export.source import find_export

    try:
        if arguments.format == "hub":
            check_repository(arguments.repo)
        if arguments.format in ("onnx", "openvino"):
            arguments.optimum = check_environment(arguments.format, arguments.optimum)
        export = find_export(arguments.student, arguments.storage, arguments.tracking_uri)
        return _push(arguments, export) if arguments.format == "hub" else _write(arguments, export)
    except (ValueError, OSError, RuntimeError) as error:
        return report_error(error)


def _push(arguments: argparse.Namespace, export) -> int:
    # as in `main`
    from raydistill.export.merge import read_provenance
    from raydistill.export.push import push
    from raydistill.export.source import open_student_export

    open_student_export(export)
    for line in read_provenance(export.folder).terms:
        print(f"terms     {line.removeprefix('- ')}")
    print(f"pushed    {push(export.folder, arguments.repo, bool(arguments.public))}")
    return _say_how(export)


def _write(arguments: argparse.Namespace, export) -> int:
    # as in `main`
    from raydistill.export.merge import check_target
    from raydistill.storage.atomic import replacing

    if arguments.out is None and export.run is None:
        raise ValueError(f"{export.folder} does not lie in a run's folder: name a folder to write with --out")
    target = arguments.out or export.run / arguments.format
    check_target(target)
    with replacing(target) as folder:
        folder.mkdir()
        report = _form(arguments, export, folder)
    print(f"checked   {report}")
    print(f"written   {target}")
    return _say_how(export)


def _form(arguments: argparse.Namespace, export, folder) -> str:
    """Write the form into an empty folder; one line on how its picture compares."""
    if arguments.format == "lora":
        # as in `main`
        from tqdm import tqdm

        from raydistill.export.lora import find_base, write_lora  # likewise

        base, name = find_base(export, arguments.base)
        with tqdm(desc="lora", unit="layer", disable=None) as bar:
            return write_lora(export, base, name, arguments.energy or 0.99, folder, bar.update)
    if arguments.format == "single-file":
        # as in `main`
        from raydistill.export.single_file import write_single_file

        apart = write_single_file(export, folder)
    else:
        # as in `main`
        from raydistill.export.optimum import write_optimum

        apart = write_optimum(export, arguments.format, arguments.optimum, folder)
    return f"one picture differs from {export.folder}'s by {apart:.2g} / 255 on average"


def _say_how(export) -> int:
    # as in `main`
    from raydistill.export.pipeline import how_to_draw

    print(f"draw it   {how_to_draw(export.folder)}")
    return 0
