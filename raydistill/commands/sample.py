"""Draw pictures with an exported student. No Ray, no training; one network evaluation a picture, or the few of its steps.

STUDENT is an export's folder, the name or folder of a run, or an MLflow run id. Every prompt is drawn once with each
seed. A picture is a function of student, prompt, prompt's number (its line in a file, its place on the command line)
and seed, whatever the batch size. With --upgrade, the student's latents go through the Bridge to the teacher's VAE,
which draws them at the teacher's resolution (512 -> 1024 px for the published models).

Writes PNG files with their prompt and seed inside, grid.png (full size) and sheet.png (small, with captions).
Exit code 2: wrong input, nothing was drawn.
"""

from __future__ import annotations

import argparse
import datetime
import secrets
from pathlib import Path

from raydistill.export.command_line import DTYPES, STUDENT_HELP, add_tracking_uri, count, parser_of, report_error
from raydistill.storage.resolve import path_argument

EXAMPLES = """examples:
  raydistill sample mine --prompt "a small red circle at the left on a white background" --seeds 0 1 2 3
  raydistill sample outputs/mine/export --prompts prompts.txt --upgrade --out pictures
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("student", metavar="STUDENT", help=STUDENT_HELP)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several prompts")
    texts.add_argument("--prompts", metavar="FILE", help="prompt file (txt, csv, tsv, jsonl, json, parquet, or a "
        "folder of json or txt)")
    add("--column", default="prompt", help="column of a tabular prompt file (default: prompt)")
    add("--number", type=count(1), default=1, metavar="N", help="number of the first --prompt (default: 1); with a "
        "line's number, draws one line of a prompt file again")
    add("--seeds", type=count(0), nargs="+", default=[0], metavar="S", help="seeds of the noise (default: 0)")
    add("--batch-size", type=count(1), default=8, metavar="N", help="pictures at once (default: 8)")
    add("--upgrade", action="store_true", help="draw at the teacher's resolution, through the Bridge")
    add("--bridge", help="Bridge of --upgrade (default: the run's)")
    add("--teacher", help="teacher whose VAE decodes with --upgrade (default: the run's)")
    add("--base", help="student model that the Bridge was trained with (default: the run's, else the export itself)")
    add("--out", type=path_argument, metavar="FOLDER", help="new or empty folder (default: <storage>/samples/<date>)")
    add("--columns", type=count(1), metavar="N", help="pictures a row (default: 8, with several seeds one row a prompt)")
    add("--shown", type=count(1), default=64, metavar="N", help="pictures in grid and sheet, at most (default: 64)")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the networks (default: float32)")
    # fmt: on
    add_tracking_uri(parser)
    arguments = parser.parse_args(argv)
    if not arguments.upgrade and (arguments.bridge or arguments.teacher or arguments.base):
        parser.error("--bridge, --teacher and --base belong to --upgrade")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error("--seeds: a seed is named twice")
    return arguments


def main() -> int:
    arguments = arguments_of()
    # after the command line is known to be right: torch takes seconds
    import torch
    from tqdm import tqdm

    # likewise
    from raydistill.data.prompts import read_prompts
    from raydistill.errors import NonFiniteError
    from raydistill.export.sampling import Album, Painter, in_steps, pictures_of, sample, typed_prompts
    from raydistill.export.source import find_export, open_student_export
    from raydistill.export.upgrade import find_upgrade
    from raydistill.spaces.published_students import load_student, open_student
    from raydistill.storage.resolve import local_path

    try:
        if arguments.prompts is not None:
            prompts = read_prompts(local_path(arguments.prompts), arguments.column)
            print(f"prompts   {prompts.report}")
        else:
            prompts = typed_prompts(arguments.prompt, arguments.number)
        folder = _new_folder(arguments)
        device = _device(arguments.device, torch)
        export = find_export(arguments.student, arguments.storage, arguments.tracking_uri)
        space, start_timestep, steps = open_student_export(export)
        open_student(space, export.folder)
        upgrade = None
        if arguments.upgrade:
            upgrade = find_upgrade(export, arguments.bridge, arguments.teacher, arguments.base)
        network = load_student(space, export.folder)
        several = (
            {"start_timestep": start_timestep, "steps": steps} if steps > 1 else {}
        )  # whose noise is the picture's own
        dtype = getattr(torch, arguments.dtype)
        painter = Painter(space, network, **several, upgrade=upgrade, device=device, dtype=dtype)
    except (ValueError, OSError) as error:
        return report_error(error)
    pictures = pictures_of(prompts, arguments.seeds)
    columns = arguments.columns or (len(arguments.seeds) if len(arguments.seeds) > 1 else 8)
    side = (upgrade.teacher if upgrade else space).resolution
    about = {"student": export.name, "start_timestep": str(start_timestep), "dtype": arguments.dtype}
    about |= {"steps": str(steps)} if steps > 1 else {}
    if upgrade:
        about["upgrade"] = f"{upgrade.bridge.name}, decoded by {Path(upgrade.teacher.folder).name}"
    album = Album(folder=folder, about=about, columns=columns, shown=arguments.shown)
    try:
        with tqdm(total=len(pictures), desc="sample", unit="picture", disable=None) as bar:
            sample(painter, pictures, album, arguments.batch_size, bar.update)
    except NonFiniteError as error:
        return report_error(error)
    files = album.finish(f"{export.name}, {in_steps(steps, start_timestep)}, {side} px")
    print(f"pictures  {folder}: {len(pictures)} of {side} px")
    for file in files:
        print(f"{file.stem:<10}{file}")
    return 0


def _new_folder(arguments: argparse.Namespace) -> Path:
    """Where to write. Raises ValueError where something is there already."""
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if arguments.out is None and not isinstance(arguments.storage, Path):
        raise ValueError(f"--storage {arguments.storage}: pictures go to a folder of this machine; name it with --out")
    folder = arguments.out or arguments.storage / "samples" / now
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder}: exists and is not an empty folder; pictures are never overwritten")
    return folder


def _device(name: str | None, torch):
    """Raises ValueError where it is not a device of this machine."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)
