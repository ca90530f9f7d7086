"""Runs from a script: configuration, distillation, evaluation. They do what the commands do, and raise instead of exiting."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.commands.distill import JOB
from raydistill.commands.evaluate import arguments_of, carry_out_evaluation, prepare_evaluation
from raydistill.config.reading import load
from raydistill.config.schema import Config
from raydistill.driver.finished import SUMMARY
from raydistill.driver.job import carry_out, make_up, prepare
from raydistill.library.sampler import Sampler
from raydistill.storage.atomic import read_json
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place
from raydistill.tracking.screen import screen


def load_config(config: str | Path | None = None, *overrides: str) -> Config:
    """A configuration: a YAML file or the name of a shipped one (default: shapes), then overrides `section.key=value`.

    Raises InputError: one line a mistake.
    """
    return load(config, overrides)


# -- distillation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished distillation.

    Attributes:
        name: of the run.
        folder: everything that it keeps; `export/` is the student.
        summary: what summary.json says: student_before, student_after, teacher, controls, stages, steps, …
        metric: `evaluation.metric`, which its line shows.
    """

    name: str
    folder: Place
    summary: dict[str, Any]
    metric: str = "mean"

    @property
    def export(self) -> Place:
        """The student, a diffusers folder."""
        return self.folder / "export"

    def sampler(self, **options: Any) -> Sampler:
        """Draws with the student; options as of `Sampler`."""
        return Sampler(str(self.export), **options)

    def __repr__(self) -> str:
        updates = [f"{self.summary['steps']} updates"] if "steps" in self.summary else []
        rows = [("before", "student_before"), ("after", "student_after"), ("teacher", "teacher")]
        tables = ((who, self.summary.get(key, {})) for who, key in rows)  # without a judge there are none
        values = [f"{who} {table[self.metric]:.3f}" for who, table in tables if table.get(self.metric) is not None]
        return f"Run({self.name}: {', '.join([*updates, *values])}; {self.folder})"


def distill(config: Config | str | Path | None = None, *overrides: str) -> Run:
    """Distil a student, as `raydistill distill` does: a run of that name is resumed, and a finished one is read.

    Args:
        config: a Config, or as `load_config` takes it.
        overrides: `section.key=value`, of a configuration that is named.

    Raises:
        InputError: wrong input, or more than the machine or cluster has; nothing was started.
        RunLocked: another living job has the run.
        StageFailed: it failed; the same call continues it.
        TypeError: overrides of a Config that is loaded already.
    """
    if isinstance(config, Config):
        if overrides:
            raise TypeError("overrides belong to load_config: this Config is loaded already")
    else:
        config = load_config(config, *overrides)
    prepared = prepare(JOB, config)
    for line in prepared.notes:
        screen.say(line)
    if prepared.inputs is not None:
        carry_out(JOB, prepared)
    else:
        make_up(JOB, prepared)
    folder, metric = prepared.folder, prepared.config.evaluation.metric
    return Run(folder.name, folder.path, read_json(folder.path / SUMMARY, "remove it, and start the run again"), metric)


# -- evaluation -------------------------------------------------------------------------------------------


PLACES = {"out", "prompt_sets", "reference"}  # options of `evaluate` that are paths


@dataclass(frozen=True)
class Scores:
    """An evaluation's result.

    Attributes:
        title: model, and how it was sampled.
        table: « all prompts» and each category -> metric -> mean.
        folder: scores.parquet, results.json, grid.png, pictures/.
        run_id: of MLflow.
    """

    title: str
    table: dict[str, dict[str, float]]
    folder: Path
    run_id: str

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over all prompts."""
        return next(iter(self.table.values()))

    def __repr__(self) -> str:
        return f"Scores({self.title}: {', '.join(f'{key} {value:.3f}' for key, value in self.means.items())}; {self.folder})"


def evaluate(
    model: str | Path | Run,
    *,
    prompts: str | Path = "heldout",
    metrics: Sequence[str] = ("judge",),
    count: int | None = None,
    storage: str | Path | None = None,
    **options: Any,
) -> Scores:
    """Draw the pictures of a prompt set and score them, as `raydistill evaluate` does.

    Args:
        model: a Run, a run's name or folder, a diffusers folder, `shapes:NAME`, a URI, a hub model, an MLflow run id.
        prompts: a file, or the name of a set.
        metrics: names, such as judge or clipscore.
        count: pictures; None: one a prompt.
        storage: where runs and evaluations are; None: where the Run is, else outputs.
        options: the command's other options with underscores: seed, steps, guidance, unet, start_timestep, out, gpus, …

    Raises:
        InputError: wrong input, or more than the machine or cluster has; nothing was started.
        StageFailed: it failed; the same call goes on.
        TypeError: an option that the command does not have.
    """
    name = str(model.folder if isinstance(model, Run) else model)
    if storage is None:
        storage = model.folder.parent if isinstance(model, Run) else "outputs"
    given = {"prompts": str(prompts), "metrics": list(metrics), "count": count, "storage": to_place(str(storage))}
    given |= {key: to_place(str(options.pop(key))) for key in PLACES & options.keys() if options[key] is not None}
    known = vars(arguments_of([name]))
    if unknown := options.keys() - known.keys():
        raise TypeError(
            f"evaluate() has no option {', '.join(sorted(unknown))}; options are {', '.join(sorted(known))}"
        )
    arguments = argparse.Namespace(**known | given | options)
    evaluation, uri = prepare_evaluation(arguments)
    table, run_id, _ = carry_out_evaluation(evaluation, uri, arguments)
    return Scores(evaluation.subject.title, table, evaluation.folder, run_id)
