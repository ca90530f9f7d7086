"""A distillation that is finished, and is asked for with another configuration: it is extended, or another run is needed."""

from __future__ import annotations

from raydistill.config.reading import flatten, get, mathematical
from raydistill.config.schema import Config
from raydistill.driver.run_folder import RunFolder, saved_config
from raydistill.errors import InputError
from raydistill.storage.atomic import read_json

SUMMARY = "summary.json"  # of a run; it is written when the run is finished
SILENT = ("storage", "run.name", "tracking.", "plan.")  # keys that change nothing that a run leaves


def additions(run: RunFolder, config: Config) -> list[str]:
    """What a finished distillation still lacks of what is asked for, for people: more updates, another control.

    A run that a plateau or a collapse has ended lacks the rest of its updates, where that is to end it no longer.

    Raises:
        InputError: it asks for fewer updates, or for more although a collapse or a plateau ended the run.
    """
    before = saved_config(run)
    if before is None:
        return []
    steps, asked = before.distill.steps, config.distill.steps
    if asked < steps:
        raise InputError(
            f"run.name={run.name} is finished after {steps} updates, and distill.steps={asked} asks for fewer: use "
            "another run.name"
        )
    found, lifted = [f"distill.steps {steps} -> {asked}"] if asked > steps else [], _lifted(before, config)
    if found or lifted:
        stopped = read_json(run.path / SUMMARY, "restore it, or use another run.name").get("stopped", {})
        if "distill" in stopped:
            found += lifted
        if "distill" in stopped and not lifted:
            raise InputError(
                f"run.name={run.name} was ended early ({stopped['distill']}), so distill.steps={asked} does not "
                "extend it: set distill.stop_on_plateau=null or distill.stop_on_collapse=false, or use another run.name"
            )
    return found + [f"control {name}" for name in config.controls if name not in before.controls]


def _lifted(before: Config, config: Config) -> list[str]:
    """Keys that ended a run early and allow more now, as « key before -> now »."""
    was, now = before.distill, config.distill
    looser = {
        "stop_on_plateau": was.stop_on_plateau is not None
        and (now.stop_on_plateau is None or now.stop_on_plateau > was.stop_on_plateau),
        "stop_on_collapse": was.stop_on_collapse and not now.stop_on_collapse,
    }
    return [f"distill.{key} {getattr(was, key)} -> {getattr(now, key)}" for key, is_so in looser.items() if is_so]


def unused(run: RunFolder, config: Config) -> list[str]:
    """Changed keys that decide no number and that a finished run has no use for, as « key before -> now »."""
    before = saved_config(run)
    if before is None:
        return []
    free = [key for key in flatten(config).keys() - mathematical(config).keys() if not key.startswith(SILENT)]
    return [
        f"{key} {get(before, key)} -> {get(config, key)}"
        for key in sorted(free)
        if get(before, key) != get(config, key)
    ]


def reopen(run: RunFolder, config: Config) -> None:
    """Take back the results that more updates replace; the stages then go on from their last checkpoints."""
    for name in ("distill", *config.controls):
        file = run.path / name / "result.json"
        if file.is_file() and read_json(file, "remove it")["steps"] < config.distill.steps:
            file.unlink()
    (run.path / SUMMARY).unlink()
