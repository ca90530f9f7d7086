"""Runs of a part of the pipeline: the pairs, the Bridge, or all of its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.driver.pipeline import PAIRS_FOLDER, Pipeline, made_bridge, opened, pairs_alone, recipe_of
from raydistill.storage.resolve import resolve

if TYPE_CHECKING:
    from raydistill.driver.bridge_ablation import Cell
    from raydistill.driver.preflight import Inputs
    from raydistill.driver.run_folder import RunFolder

PAIRS_SUMMARY = f"{PAIRS_FOLDER}/summary.json"  # of a run; it is written when the set is complete


def bridge_only(config: Config, run: RunFolder, inputs: Inputs) -> str:
    """Pairs and the Bridge, nothing else; returns the Bridge's folder. Raises StageFailed."""
    from raydistill.bridge.model import read_description
    from raydistill.tracking.store import ui_command
    from raydistill.tracking.tracker import Tracker

    with opened(config, run, inputs) as pipeline:
        folder = made_bridge(pipeline, pairs_alone(pipeline))
        tracker = Tracker(pipeline.uri, pipeline.parent)
        metrics = dict(read_description(resolve(folder))["metrics"])
        tracker.metrics(metrics, int(metrics.pop("step", config.bridge.steps)))
        tracker.close()
        print(f"folder    {folder}  (bridge.checkpoint={folder})")
        print(f"MLflow    {ui_command(pipeline.uri)}")
    return folder


def check_trainable(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError where there is nothing to train."""
    from raydistill.errors import InputError

    if config.bridge.projector == "identity":
        raise InputError("bridge.projector=identity has nothing to train: use swinir, unet or mlp")


def check_ablation(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError where a variant cannot be built for this pair of spaces."""
    from raydistill.driver.bridge_ablation import cells
    from raydistill.storage.resolve import require_folder

    require_folder(run.storage, "--ablate")
    cells(config, inputs.student, inputs.teacher)


def ablate_bridge(config: Config, run: RunFolder, inputs: Inputs) -> dict[str, Any]:
    """Pairs, then every variant of the Bridge with every seed; returns and writes the tables. Raises StageFailed."""
    from raydistill.driver.bridge_ablation import cells, markdown, summarise
    from raydistill.evaluation.summary import write_summary
    from raydistill.tracking.store import ui_command
    from raydistill.tracking.tracker import Tracker

    with opened(config, run, inputs) as pipeline:
        planned = cells(config, inputs.student, inputs.teacher)
        pairs = pairs_alone(pipeline)
        with pipeline.timed("ablation"):
            results = _train_cells(pipeline, planned, pairs)
        summary = summarise(results) | {"mlflow_run_id": pipeline.parent}
        tracker = Tracker(pipeline.uri, pipeline.parent)
        tracker.text(markdown(summary), "ablation.md")
        tracker.note(markdown(summary))
        tracker.close()
        write_summary(run.path / "ablation.json", summary)
        print(markdown(summary))
        for table, same in summary["paper_order"].items():
            print(f"{table:<13}the order of PSNR is {'the' if same else 'not the'} paper's")
        print(f"MLflow       {ui_command(pipeline.uri)}")
    return summary


def _train_cells(pipeline: Pipeline, planned: list[Cell], pairs: str) -> list[dict[str, Any]]:
    """Every cell as a Ray task with a worker's resources, as many at once as fit; those that are done are read.

    Raises:
        StageFailed: a cell failed; the others are kept.
    """
    import json

    import ray
    from tqdm import tqdm

    from raydistill.driver.bridge_ablation import result_file, steps_done, train_cell
    from raydistill.errors import StageFailed

    distill, folder = pipeline.config.distill, pipeline.run.path / "ablation"
    folder.mkdir(exist_ok=True)
    task = ray.remote(train_cell).options(
        num_cpus=distill.cpus_per_worker,
        num_gpus=distill.gpus_per_worker,
        max_retries=distill.max_failures,  # of lost nodes; a cell's own errors are not retried
        label_selector=distill.node_labels or None,
    )
    tasks, runs, results = {}, {}, {}
    for cell in planned:
        runs[cell.name] = pipeline.stage_run(validate(cell.config), f"ablation-{cell.name}", cell.name)
        if result_file(folder, cell).is_file():
            results[cell.name] = json.loads(result_file(folder, cell).read_text())
            pipeline.finish(runs[cell.name])  # perhaps the driver ended before it could
        else:
            tasks[task.remote(cell, pairs, folder, (pipeline.uri, runs[cell.name]))] = cell
    steps = pipeline.config.bridge.steps
    waiting, failed = list(tasks), {}
    with tqdm(total=len(planned) * steps, desc="ablation", unit="step", disable=None) as bar:
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1, timeout=2)
            for reference in ended:
                cell = tasks[reference]
                try:
                    results[cell.name] = ray.get(reference)
                    metrics = results[cell.name]["metrics"]
                    pipeline.finish(runs[cell.name])
                    tqdm.write(f"{cell.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
                except ray.exceptions.RayError as error:
                    failed[cell.name] = str(error).strip().splitlines()[-1]
                    pipeline.finish(runs[cell.name], "FAILED")
            bar.n = steps_done(folder, planned, steps)
            bar.refresh()
    if failed:
        raise StageFailed("; ".join(f"ablation {name}: {text}" for name, text in failed.items()))
    return [results[cell.name] for cell in planned]


def pairs_only(config: Config, run: RunFolder, inputs: Inputs) -> str:
    """The set of pairs, nothing else; returns its folder, whose summary.json says that it is complete.

    Raises:
        StageFailed: with the reason; the run can be continued.
    """
    from raydistill.data.pairs import count_rows
    from raydistill.data.shards import FAILURES_FILE
    from raydistill.evaluation.summary import write_summary
    from raydistill.tracking.store import ui_command

    with opened(config, run, inputs) as pipeline:
        folder = pairs_alone(pipeline)
        rows = count_rows(folder)
        failed = recipe_of(config, inputs).count - rows
        seconds = pipeline.seconds["synthesis"]
        write_summary(
            run.path / PAIRS_SUMMARY,
            {
                "folder": folder,
                "rows": rows,
                "failed_rows": failed,
                "stages": {name: round(value, 1) for name, value in pipeline.seconds.items()},
                "mlflow_run_id": pipeline.parent,
            },
        )
        print(f"pairs     {folder}: {rows} rows, {failed} failed, {seconds:.0f} s", flush=True)
        if failed:
            print(f"failures  {run.path / PAIRS_FOLDER / FAILURES_FILE}")
        print(f"MLflow    {ui_command(pipeline.uri)}")
    return folder


def check_pairs_folder(config: Config, run: RunFolder, inputs: Inputs) -> None:
    """Raises InputError if the run's folder holds rows that were made with other models, prompts or images."""
    from raydistill.data.shards import check_settings

    check_settings(run.path / PAIRS_FOLDER, recipe_of(config, inputs).settings())
