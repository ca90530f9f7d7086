"""Evaluate a model on a prompt set: draw its pictures, score them, and log table, parquet and grid.

MODEL is a run's name or folder, an export or any other diffusers folder (one-step student, multi-step student, or a
teacher such as shapes:flux), a hub model in the cache, or an MLflow run id. Every prompt is drawn once (--count: more, with
further seeds, or a seeded part of them) with noise that depends on seed and prompt's number alone. Drawing and scoring are a
Ray Data stream; a job that was stopped goes on where it was when the same command is given again, and another metric can
be added afterwards without drawing again.

Metrics: judge (the shapes world's attributes, all of them, relation of two objects), clipscore, pickscore, frechet (distance
of the judge's features to --reference), fid, hpsv3, hpsv2 (version 2.1, times 100), imagereward, and command:NAME=PROGRAM, a scorer of
your own (DPG-Bench, MPS; raydistill/evaluation/command.py says what it reads and writes). fid and the rewards run in
environments of their own, which Ray builds with pip at first use. Weights are found in the hub's cache or fetched; --weights names
copies.

Writes scores.parquet, results.json, grid.png and pictures/ to --out, and logs them to MLflow, nested in the run that made the
model where there is one. Exit code 2: wrong input, nothing was started; 1: failed, and can be continued.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from raydistill.export.command_line import DTYPES, count, parser_of, report_error
from raydistill.storage.resolve import path_argument, place_argument

if TYPE_CHECKING:
    from raydistill.evaluation.evaluation import Evaluation

EXAMPLES = """examples:
  raydistill evaluate mine --count 512
  raydistill evaluate shapes:sd15 --unet shapes:sd15-onestep --start-timestep 999
  raydistill evaluate shapes:flux --steps 12 --prompts shapes-pairs
  raydistill evaluate mine --metrics judge frechet --reference outputs/evaluations/flux-heldout-0123abcd
  raydistill evaluate mine --prompts train.parquet --holdout 0.001 --metrics clipscore pickscore
  raydistill evaluate mine --prompts PartiPrompts.tsv --metrics clipscore hpsv2 "command:mps=python score_mps.py"
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, EXAMPLES)
    # fmt: off
    add = parser.add_argument
    add("model", metavar="MODEL", help="run's name or folder, diffusers folder, URI of one, or MLflow run id")
    add("--prompts", default="heldout", metavar="FILE|NAME", help="prompt file (txt, csv, tsv, jsonl, parquet, json, or a "
        "folder of json or txt), or a set: heldout, shapes-pairs, parti, hpsv2, hpsv3, imagereward, dpg (default: heldout)")
    add("--holdout", type=float, metavar="SHARE", help="of --prompts, only the prompts that a run with "
        "evaluation.holdout=SHARE holds out (default: all)")
    add("--prompt-sets", type=place_argument, metavar="FOLDER",
        help="where the published sets were put (default: <storage>/prompts)")
    add("--column", help="column of the prompt (default: prompt, Prompt or caption)")
    add("--category-column", metavar="COLUMN", help="column of the category (default: category or Category, if there)")
    add("--metrics", nargs="+", default=["judge"], metavar="METRIC", help="see above (default: judge)")
    add("--count", type=count(1), metavar="N", help="pictures (default: one a prompt)")
    add("--seed", type=count(0), default=0, metavar="S", help="seed of the noise (default: 0)")
    add("--steps", type=count(1), metavar="N", help="of a multi-step model (default: 28; a student's export takes its own)")
    add("--guidance", type=float, metavar="G", help="guidance scale of a multi-step model; 0 to 1: none "
        "(default: its family's)")
    add("--unet", metavar="PLACE", help="one-step weights to put into MODEL, as student.unet names them")
    add("--start-timestep", type=count(1), metavar="T", help="of --unet (default: what the checkpoint says)")
    add("--reference", type=Path, metavar="FOLDER", help="pictures, or an earlier evaluation, for frechet and fid")
    add("--weights", nargs="+", default=[], metavar="NAME=PLACE", help="weights of a metric: file, folder or hub id "
        "(clipscore, pickscore, pickscore.processor, hpsv3, hpsv3.base, hpsv2, imagereward, imagereward.config, imagereward.tokenizer, fid)")
    add("--judge", default="shapes:judge", help="judge of judge and frechet (default: shapes:judge)")
    add("--out", type=path_argument, metavar="DIR",
        help="folder (default: <storage>/evaluations/<model>-<prompts>-<hash>)")
    add("--batch-size", type=count(1), default=16, metavar="N", help="pictures at once (default: 16)")
    add("--actors", type=count(1), default=1, metavar="N", help="actors that draw (default: 1)")
    add("--gpus", type=float, metavar="SHARE",
        help="GPUs of each actor (default: where the cluster has one now, one divided among all actors; else none)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    add("--tracking-uri", metavar="URI", help="MLflow (default: that of the run that made the model, else "
        "$MLFLOW_TRACKING_URI, else <storage>/mlflow.db)")
    add("--experiment", default="raydistill", help="MLflow experiment of a model that no run made (default: raydistill)")
    # fmt: on
    return parser.parse_args(argv)


def evaluation_of(arguments: argparse.Namespace) -> Evaluation:
    """Check everything and find everything. Raises ValueError, which names option, file or row; starts nothing."""
    # once the command line is known to be right: torch takes seconds
    from raydistill.evaluation.evaluation import Evaluation, Resources, open_folder
    from raydistill.evaluation.metrics import find_metrics, open_reference
    from raydistill.evaluation.promptsets import open_prompts
    from raydistill.evaluation.subject import find_subject
    from raydistill.evaluation.weights import parse_weights

    given = arguments
    for option, folder in (("--storage", given.storage), ("--out", given.out)):
        relative = isinstance(folder, Path) and not folder.is_absolute()
        if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and relative:
            raise ValueError(
                f"{option} {folder}: is relative, and under `ray job submit` the working directory is a copy that is thrown "
                "away; name an absolute folder"
            )
    if given.gpus is not None and given.gpus < 0:
        raise ValueError(f"--gpus {given.gpus}: must not be negative")
    if given.holdout is not None and not 0 < given.holdout < 1:
        raise ValueError(f"--holdout {given.holdout:g}: must be above 0 and below 1")
    sets = given.prompt_sets or given.storage / "prompts"
    prompts = open_prompts(given.prompts, sets, given.column, given.category_column, given.holdout)
    asked = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")  # for a run id that is not in storage
    subject = find_subject(
        given.model, given.storage, asked, given.steps, given.guidance, given.unet, given.start_timestep
    )
    pictures = prompts.pictures(given.count, given.seed)
    metrics = find_metrics(given.metrics, parse_weights(given.weights), pictures, given.judge)
    found = {
        "subject": subject,
        "prompts": prompts,
        "pictures": pictures,
        "metrics": metrics,
        "reference": open_reference(given.reference, metrics),
    }
    folder, settings = open_folder(given.out, given.storage, **found, dtype=given.dtype, batch_size=given.batch_size)
    threads = int(os.environ["OMP_NUM_THREADS"]) if os.environ.get("OMP_NUM_THREADS", "").isdecimal() else None
    resources = Resources(given.dtype, given.actors, given.gpus, threads)
    return Evaluation(**found, resources=resources, folder=folder, settings=settings)


def prepare_evaluation(arguments: argparse.Namespace) -> tuple[Evaluation, str]:
    """The checked evaluation, and MLflow's URI. Raises ValueError or TrackingError; starts nothing."""
    # once the command line is known to be right: torch, Ray and mlflow take seconds
    from raydistill.driver.evaluation import check_room, pools_of
    from raydistill.driver.room import MACHINE, this_machine
    from raydistill.evaluation.mlflow_log import store_of
    from raydistill.tracking.store import prepare

    evaluation = evaluation_of(arguments)
    uri = store_of(arguments.tracking_uri, evaluation.subject, arguments.storage)
    if (have := this_machine()) is not None:
        check_room(pools_of(evaluation), [({}, have)], MACHINE)
    prepare(uri)  # last: it makes the store
    return evaluation, uri


def carry_out_evaluation(
    evaluation: Evaluation, uri: str, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], str, str | None]:
    """(table of means, MLflow run, the run above it or None). Raises InputError, StageFailed or TrackingError."""
    # Ray, once everything is checked
    from raydistill.driver.cluster import connected
    from raydistill.driver.evaluation import run_evaluation
    from raydistill.evaluation.mlflow_log import log_results
    from raydistill.tracking.screen import screen

    with connected(), screen.count("evaluate", len(evaluation.pictures), "picture") as done:
        table = run_evaluation(evaluation, done)
    return table, *log_results(evaluation, table, uri, arguments.experiment, arguments.storage)


def main() -> int:
    arguments = arguments_of()
    # after the command line is known to be right: torch, Ray and mlflow take seconds
    from raydistill.errors import InputError, StageFailed
    from raydistill.evaluation.summary import table as table_of
    from raydistill.tracking.screen import screen
    from raydistill.tracking.store import TrackingAway, TrackingError, ui_command, ui_lines

    try:
        evaluation, uri = prepare_evaluation(arguments)
    except TrackingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        return report_error(error)
    title, pictures = evaluation.subject.title, len(evaluation.pictures)
    screen.say(f"model     {title}\nprompts   {evaluation.prompts.prompts.report}\nfolder    {evaluation.folder}")
    try:
        table, run_id, parent = carry_out_evaluation(evaluation, uri, arguments)
    except InputError as error:  # the cluster could never place it
        return report_error(error)
    except (StageFailed, TrackingError) as error:
        print(f"error: {error}\nthe same command goes on where this stopped", file=sys.stderr)
        return 1
    shown = table_of(table, f"{title}: {pictures} pictures of {evaluation.prompts.name}")
    screen.show(shown, width=160)
    screen.say(f"scores    {evaluation.folder / 'scores.parquet'}\ngrid      {evaluation.folder / 'grid.png'}")
    try:
        page = ui_lines(uri, run_id)
    except TrackingAway:  # since the results were logged
        page = [ui_command(uri)]
    screen.say(f"run       {run_id}" + (f", nested in {parent}" if parent else ""))
    screen.say("\n".join(f"{name:<9} {line}" for name, line in zip(["MLflow", ""], page, strict=False)))
    made_by = evaluation.subject.run_id
    if made_by and parent is None:
        screen.say(f"note      the run that made the model, {made_by}, is not in this store (--tracking-uri)")
    return 0
