"""Evaluate a model on a prompt set: draw its pictures, score them, and log table, parquet and grid.

MODEL is a run's name or folder, an export or any other diffusers folder (one-step student, multi-step student, or a
teacher such as shapes:flux), a hub model in the cache, or an MLflow run id. Every prompt is drawn once (--count: more, with
further seeds, or a seeded part of them) with noise that depends on seed and prompt's number alone. Drawing and scoring are a
Ray Data stream; a job that was stopped goes on where it was when the same command is given again, and another metric can
be added afterwards without drawing again.

Metrics: judge (the shapes world's attributes, all of them, relation of two objects), clipscore, frechet (distance of the
judge's features to --reference), fid, hpsv3, hpsv2 (version 2.1, times 100), imagereward, and command:NAME=PROGRAM, a scorer of
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

from raydistill.storage.resolve import path_argument, place_argument

EXAMPLES = """examples:
  python jobs/evaluate.py mine --count 512
  python jobs/evaluate.py shapes:sd15 --unet shapes:sd15-onestep --start-timestep 999
  python jobs/evaluate.py shapes:flux --steps 12 --prompts shapes-pairs
  python jobs/evaluate.py mine --metrics judge frechet --reference outputs/evaluations/flux-heldout-0123abcd
  python jobs/evaluate.py mine --prompts PartiPrompts.tsv --metrics clipscore hpsv2 "command:mps=python score_mps.py"
"""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run's name or folder, diffusers folder, URI of one, or MLflow run id")
    add(
        "--prompts",
        default="heldout",
        metavar="FILE|NAME",
        help="prompt file (txt, csv, tsv, jsonl, parquet, json, or a "
        "folder of json or txt), or a set: heldout, shapes-pairs, parti, hpsv2, hpsv3, imagereward, dpg (default: heldout)",
    )
    add(
        "--prompt-sets",
        type=place_argument,
        metavar="FOLDER",
        help="where the published sets were put (default: <storage>/prompts)",
    )
    add("--column", help="column of the prompt (default: prompt, Prompt or caption)")
    add("--category-column", metavar="COLUMN", help="column of the category (default: category or Category, if there)")
    add("--metrics", nargs="+", default=["judge"], metavar="METRIC", help="see above (default: judge)")
    add("--count", type=_count(1), metavar="N", help="pictures (default: one a prompt)")
    add("--seed", type=_count(0), default=0, metavar="S", help="seed of the noise (default: 0)")
    add("--steps", type=_count(1), metavar="N", help="of a multi-step model (default: 28; a one-step export takes one)")
    add("--guidance", type=float, metavar="G", help="guidance scale of a multi-step model (default: its family's)")
    add("--unet", metavar="PLACE", help="one-step weights to put into MODEL, as student.unet names them")
    add("--start-timestep", type=_count(1), metavar="T", help="of --unet (default: what the checkpoint says)")
    add("--reference", type=Path, metavar="FOLDER", help="pictures, or an earlier evaluation, for frechet and fid")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=PLACE",
        help="weights of a metric: file, folder or hub id "
        "(clipscore, hpsv3, hpsv3.base, hpsv2, imagereward, imagereward.config, imagereward.tokenizer, fid)",
    )
    add("--judge", default="shapes:judge", help="judge of judge and frechet (default: shapes:judge)")
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="folder (default: <storage>/evaluations/<model>-<prompts>-<hash>)",
    )
    add("--batch-size", type=_count(1), default=16, metavar="N", help="pictures at once (default: 16)")
    add("--actors", type=_count(1), default=1, metavar="N", help="actors that draw (default: 1)")
    add(
        "--gpus",
        type=float,
        metavar="SHARE",
        help="GPUs of each actor (default: where the cluster has one now, one divided among the stages; else none)",
    )
    add(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    add(
        "--storage",
        type=place_argument,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where runs are (default: outputs)",
    )
    add(
        "--tracking-uri",
        metavar="URI",
        help="MLflow (default: that of the run that made the model, else $MLFLOW_TRACKING_URI, else <storage>/mlflow.db)",
    )
    add(
        "--experiment", default="raydistill", help="MLflow experiment of a model that no run made (default: raydistill)"
    )
    return parser.parse_args(argv)  # fmt: skip


def _count(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is needed")
        return int(text)

    return number


def plan_of(arguments: argparse.Namespace):
    """Check everything and find everything. Raises ValueError, which names option, file or row; starts nothing."""
    from raydistill.evaluation.evaluate import Plan, find_metrics, open_folder, open_reference
    from raydistill.evaluation.promptsets import open_prompts
    from raydistill.evaluation.subject import find_subject
    from raydistill.evaluation.weights import parse_weights

    told = arguments
    for option, folder in (("--storage", told.storage), ("--out", told.out)):
        relative = isinstance(folder, Path) and not folder.is_absolute()
        if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and relative:
            raise ValueError(
                f"{option} {folder}: is relative, and under `ray job submit` the working directory is a copy that is thrown "
                "away; name an absolute folder"
            )
    prompts = open_prompts(
        told.prompts, told.prompt_sets or told.storage / "prompts", told.column, told.category_column
    )
    asked = told.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")  # for a run id that is not in storage
    subject = find_subject(told.model, told.storage, asked, told.steps, told.guidance, told.unet, told.start_timestep)
    items = prompts.items(told.count, told.seed)
    metrics = find_metrics(told.metrics, parse_weights(told.weights), items, told.judge)
    reference = open_reference(told.reference, metrics)
    resources = _resources(told)
    folder, settings = open_folder(
        told.out, told.storage, subject, prompts, items, metrics, reference, resources, told.batch_size
    )
    return Plan(subject, prompts, items, metrics, reference, folder, settings, resources)


def _resources(told: argparse.Namespace):
    from raydistill.evaluation.evaluate import Resources

    if told.gpus is not None and told.gpus < 0:
        raise ValueError(f"--gpus {told.gpus}: must not be negative")
    threads = int(os.environ["OMP_NUM_THREADS"]) if os.environ.get("OMP_NUM_THREADS", "").isdecimal() else None
    return Resources(told.dtype, told.actors, told.gpus, threads)


def main() -> int:
    arguments = arguments_of()
    from raydistill.evaluation.evaluate import store_of
    from raydistill.tracking.store import TrackingError, prepare, ui_command

    try:
        plan = plan_of(arguments)
        uri = store_of(arguments.tracking_uri, plan.subject, arguments.storage)
        prepare(uri)
    except (ValueError, OSError, TrackingError) as error:  # every input error of the project says what to do
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    print(
        f"model     {plan.subject.title}\nprompts   {plan.prompts.prompts.report}\nfolder    {plan.folder}", flush=True
    )

    from rich.console import Console
    from tqdm import tqdm

    from raydistill.driver.cluster import connected
    from raydistill.errors import StageFailed
    from raydistill.evaluation.evaluate import log_results, run_evaluation
    from raydistill.evaluation.summary import table as table_of

    try:
        with connected(), tqdm(total=len(plan.items), desc="evaluate", unit="picture", disable=None) as bar:
            table = run_evaluation(plan, bar.update)
        run_id, parent = log_results(plan, table, uri, arguments.experiment, arguments.storage)
    except (StageFailed, TrackingError) as error:
        print(f"error: {error}\nthe same command goes on where this stopped", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 160).print(
        table_of(table, f"{plan.subject.title}: {len(plan.items)} pictures of {plan.prompts.name}")
    )
    print(f"scores    {plan.folder / 'scores.parquet'}\ngrid      {plan.folder / 'grid.png'}")
    print(f"mlflow    run {run_id}" + (f", nested in {parent}" if parent else "") + f"; {ui_command(uri)}")
    if plan.subject.run_id and parent is None:
        print(f"note      the run that made the model, {plan.subject.run_id}, is not in this store (--tracking-uri)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
