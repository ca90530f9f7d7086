"""Runs of a part of the pipeline: the pairs, the Bridge, or all of its variants."""

from __future__ import annotations

import json
from typing import Any

import ray

from raydistill.bridge.model import read_description
from raydistill.config.reading import streams_bridge, validate
from raydistill.config.schema import Config
from raydistill.data.pairs import count_rows, covered_rows
from raydistill.data.shards import FAILURES_FILE, check_settings
from raydistill.driver.bridge_ablation import Cell, cells, markdown, result_file, steps_done, summarise, train_cell
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import RunFolder
from raydistill.driver.run_record import RunRecord, open_record
from raydistill.driver.stages import PAIRS_FOLDER, make_pairs_alone, recipe_of, train_bridge_on
from raydistill.errors import InputError, StageFailed
from raydistill.evaluation.summary import write_summary
from raydistill.storage.resolve import require_folder, resolve
from raydistill.tracking.screen import screen
from raydistill.tracking.tracker import Tracker

PAIRS_SUMMARY = f"{PAIRS_FOLDER}/summary.json"  # of a run; it is written when the set is complete


def bridge_only(config: Config, run: RunFolder, inputs: Inputs) -> str:
    """Pairs and the Bridge, nothing else; returns the Bridge's folder. Raises StageFailed."""
    with open_record(config, run, inputs) as record:
        pairs = None if streams_bridge(config) else make_pairs_alone(record)
        folder = train_bridge_on(record, pairs)
        tracker = Tracker(record.uri, record.parent)
        metrics = dict(read_description(resolve(folder))["metrics"])
        tracker.metrics(metrics, int(metrics.pop("step", config.bridge.steps)))
        tracker.close()
        screen.say(f"folder    {folder}  (bridge.checkpoint={folder})")
        screen.say("\n".join(record.ui))
    return folder


def check_trainable(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError where there is nothing to train."""
    if config.bridge.projector == "identity":
        raise InputError("bridge.projector=identity has nothing to train: use swinir, unet or mlp")


def check_ablation(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError where a variant cannot be built for this pair of spaces."""
    require_folder(run.storage, "--ablate")
    if config.bridge.source == "stream":
        raise InputError("bridge.source=stream: --ablate trains its variants on stored pairs; use bridge.source=stored")
    cells(config, inputs.student, inputs.teacher)


def ablate_bridge(config: Config, run: RunFolder, inputs: Inputs) -> dict[str, Any]:
    """Pairs, then every variant of the Bridge with every seed; returns and writes the tables. Raises StageFailed."""
    with open_record(config, run, inputs) as record:
        planned = cells(config, inputs.student, inputs.teacher)
        pairs = make_pairs_alone(record)
        with record.timed("ablation"):
            results = _train_cells(record, planned, pairs)
        summary = summarise(results) | {"mlflow_run_id": record.parent}
        tracker = Tracker(record.uri, record.parent)
        tracker.text(markdown(summary), "ablation.md")
        tracker.note(markdown(summary))
        tracker.close()
        write_summary(run.path / "ablation.json", summary)
        screen.say(markdown(summary))
        for table, same in summary["paper_order"].items():
            screen.say(f"{table:<13}the order of PSNR is {'the' if same else 'not the'} paper's")
        screen.say("\n".join(record.ui))
    return summary


def _train_cells(record: RunRecord, planned: list[Cell], pairs: str) -> list[dict[str, Any]]:
    """Every cell as a Ray task with a worker's resources, as many at once as fit; those that are done are read.

    Raises StageFailed: a cell failed; the others are kept.
    """
    distill, folder = record.config.distill, record.run.path / "ablation"
    folder.mkdir(exist_ok=True)
    task = ray.remote(train_cell).options(
        num_cpus=distill.cpus_per_worker,
        num_gpus=distill.gpus_per_worker,
        max_retries=distill.max_failures,  # of lost nodes; a cell's own errors are not retried
        label_selector=distill.node_labels or None,
    )
    tasks, runs, results = {}, {}, {}
    for cell in planned:
        runs[cell.name] = record.stage_run(validate(cell.config), f"ablation-{cell.name}", cell.name)
        if result_file(folder, cell).is_file():
            results[cell.name] = json.loads(result_file(folder, cell).read_text())
            record.finish(runs[cell.name])  # perhaps the driver ended before it could
        else:
            tasks[task.remote(cell, pairs, folder, (record.uri, runs[cell.name]))] = cell
    steps = record.config.bridge.steps
    waiting, failed = list(tasks), {}
    with screen.count("ablation", len(planned) * steps, "step") as more:
        done = 0
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1, timeout=2)
            for reference in ended:
                cell = tasks[reference]
                try:
                    results[cell.name] = ray.get(reference)
                    metrics = results[cell.name]["metrics"]
                    record.finish(runs[cell.name])
                    screen.say(f"{cell.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
                except ray.exceptions.RayError as error:
                    failed[cell.name] = str(error).strip().splitlines()[-1]
                    record.finish(runs[cell.name], "FAILED")
            before, done = done, steps_done(folder, planned, steps)
            more(done - before)
    if failed:
        raise StageFailed("; ".join(f"ablation {name}: {text}" for name, text in failed.items()))
    return [results[cell.name] for cell in planned]


def pairs_only(config: Config, run: RunFolder, inputs: Inputs) -> str:
    """The set of pairs, nothing else; returns its folder, whose summary.json says that it is complete.

    Raises StageFailed: with the reason; the run can be continued.
    """
    with open_record(config, run, inputs) as record:
        folder = make_pairs_alone(record)
        rows = count_rows(folder)
        failed = covered_rows(folder) - rows
        summary = {"folder": folder, "rows": rows, "failed_rows": failed}
        summary["stages"] = {name: round(seconds, 1) for name, seconds in record.seconds.items()}
        write_summary(run.path / PAIRS_SUMMARY, summary | {"mlflow_run_id": record.parent})
        seconds = record.seconds["synthesis"]
        screen.say(f"pairs     {folder}: {rows} rows, {failed} failed, {seconds:.0f} s")
        if failed:
            screen.say(f"failures  {run.path / PAIRS_FOLDER / FAILURES_FILE}")
        screen.say("\n".join(record.ui))
    return folder


def check_pairs_folder(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError if the run's folder holds rows that were made with other models, prompts or images."""
    check_settings(run.path / PAIRS_FOLDER, recipe_of(config, inputs).settings())
