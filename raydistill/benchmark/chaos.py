"""One small distillation twice, quietly and while its processes are killed and frozen, and every difference between them.

The run has two workers and two teacher replicas. It lives on a cluster of its own (a head, and a node that is lost from
time to time) and logs to an MLflow server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raydistill.benchmark.measure import markdown, median, option
from raydistill.benchmark.soak import FAULTS, Soak, Strike
from raydistill.benchmark.world import SPOT, World
from raydistill.tracking.store import client_of
from raydistill.workers.checkpoint import load_state
from raydistill.workers.step_log import consumed_by_all, read_lines, step_file, steps_of

LEFT_S = 20.0  # for processes to end by themselves
WORKERS = 2  # of the run; its teachers have as many replicas
# what a cluster keeps for itself once it has run anything
CLUSTERS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor",
                "ray::_StatsActor", "ray::_UsageCollectionActor", "ray::ActorLocationTracker")  # fmt: skip
CLEANER = "ray::PlacementGroupCleaner"  # of Ray Train; outlives a killed controller (its exit fails in a thread)
OWN_TIMES = ("time/", "throughput/", "teachers/")  # metrics that two runs need not share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--kills", 30, "how many faults, at least")
    option(parser, "--steps", None, "student updates of the run; default: eight a fault", type=int)
    option(parser, "--seed", 0, "of the choice of faults")
    option(parser, "--minutes", None, "no further fault after that; default: no limit", type=float)
    option(parser, "--only", None, "only these kinds of fault", nargs="+", choices=FAULTS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs and their comparison; `passed` says whether there is no difference."""
    storage = Path(arguments.storage).absolute() / "benchmark" / time.strftime("chaos-%Y%m%d-%H%M%S")
    steps = arguments.steps or 8 * arguments.kills
    started = time.monotonic()
    with World(storage) as world:

        def start(name: str) -> subprocess.Popen[bytes]:
            return world.start_job("distill", _overrides(world, storage, name, steps), storage / f"{name}.log")

        print(f"chaos: {storage}", flush=True)
        quiet_started = time.monotonic()
        if code := start("quiet").wait():
            raise RuntimeError(f"the quiet run ended with code {code}; see {storage / 'quiet.log'}")
        chaos_started = time.monotonic()
        quiet_s = chaos_started - quiet_started
        print(f"chaos: the quiet run took {quiet_s:.0f} s", flush=True)
        soak = Soak(
            world=world,
            folder=storage / "chaos" / "distill",
            start_driver=lambda: start("chaos"),
            kills=arguments.kills,
            until=started + 60 * arguments.minutes if arguments.minutes else float("inf"),
            faults=list(arguments.only or FAULTS),
            choice=random.Random(arguments.seed),
        )
        soak.run()
        chaos_s = time.monotonic() - chaos_started
        left = _left(lambda: [title for title, _ in world.workers() if not title.startswith((*CLUSTERS_OWN, CLEANER))])
        cleaners = len(world.titled(CLEANER))
        compared = _compare(world, storage)
    left += _left(lambda: [" ".join(process.cmdline()) for process in world.marked()])
    result = {
        "steps": steps,
        "kills": len(soak.strikes),
        "driver_starts": soak.starts,
        "driver_exits": soak.exits,
        "quiet_s": round(quiet_s, 1),
        "quiet_step_s": round(median(line["values"]["time/step"] for line in _lines(storage, "quiet", 0)), 3),
        "chaos_s": round(chaos_s, 1),
        "recovery": _recovery(soak.strikes),
        "processes_left": [title.strip()[:80] for title in left],
        "ray_train_cleaners_left": cleaners,
        **compared,
    }
    clean = (
        "weights_differing", "metrics_differing", "prompts_doubled", "prompts_skipped", "requests_lost",
        "mlflow_values_missing",
    )  # fmt: skip
    result["passed"] = len(soak.strikes) >= arguments.kills and not left and not any(result[key] for key in clean)
    return result


def _overrides(world: World, storage: Path, name: str, steps: int) -> list[str]:
    labels = json.dumps(SPOT)
    return [
        f"storage={storage}", f"run.name={name}", f"tracking.uri={world.server.uri}", f"distill.steps={steps}",
        "distill.batch_size=2", "distill.checkpoint_every=2", f"distill.evaluate_every={max(2, steps // 4)}",
        f"distill.workers={WORKERS}", f"teachers.replicas={WORKERS}", "distill.max_failures=-1",
        "distill.max_failures_without_progress=-1", "distill.cpus_per_worker=0.3", f"distill.node_labels={labels}",
        "fake_score.updates=1", "discriminator.real_count=32", "evaluation.count=8", "evaluation.periodic_count=8",
        "evaluation.grid=4", "teacher.sampling_steps=2", "teachers.shards=2", "teachers.slice=1",
        f"teachers.node_labels={labels}", "controls=[]",
    ]  # fmt: skip


def _left(living: Callable[[], list[str]]) -> list[str]:
    """What still lives after LEFT_S."""
    deadline = time.monotonic() + LEFT_S
    while (found := living()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _lines(storage: Path, name: str, rank: int) -> list[dict[str, Any]]:
    """The step log of one worker of a run."""
    return read_lines(step_file(storage / name / "distill", rank))


def _compare(world: World, storage: Path) -> dict[str, Any]:
    quiet, chaos = ([_lines(storage, name, rank) for rank in range(WORKERS)] for name in ("quiet", "chaos"))
    ids, wanted = (consumed_by_all(storage / name / "distill").tolist() for name in ("chaos", "quiet"))
    first, second = ([steps_of(lines) for lines in logs] for logs in (quiet, chaos))
    one, other = (
        {
            (rank, step, key): value
            for rank, steps in enumerate(ranks)
            for step, line in steps.items()
            for key, value in _own(line["values"]).items()
        }
        for ranks in (first, second)
    )
    return {
        "weights_differing": _differing(*(_last_state(storage / name / "distill") for name in ("quiet", "chaos"))),
        "metrics_differing": sorted({key[-1] for key, value in one.items() if other.get(key) != value}),
        "steps_done": len(second[0]),
        "steps_done_again": len(chaos[0]) - len(second[0]),
        "prompts_consumed": len(ids),
        "prompts_doubled": len(ids) - len(set(ids)),
        "prompts_skipped": len(set(wanted) - set(ids)),
        "ids_changed_on_repeat": sum(map(_changed_on_repeat, chaos)),
        "requests": sum(map(len, chaos)),
        "requests_repeated": int(sum(map(_repeated, chaos))),
        # an update waits for its answer: without one it is missing
        "requests_lost": sum(len(ours.keys() - theirs.keys()) for ours, theirs in zip(first, second, strict=True)),
        "mlflow_values_missing": _missing_in_mlflow(world, storage, second[0]),
    }


def _own(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.startswith(OWN_TIMES)}


def _changed_on_repeat(lines: list[dict[str, Any]]) -> int:
    """Steps that were done again with other samples than the first time."""
    first: dict[int, Any] = {}
    return sum(first.setdefault(line["step"], line["samples"]) != line["samples"] for line in lines)


def _repeated(lines: list[dict[str, Any]]) -> float:
    """Attempts after the first of all requests; the counter starts anew with each worker."""
    counts = [0.0, *(line["values"]["teachers/repeated"] for line in lines)]
    return sum(now - before if now >= before else now for before, now in itertools.pairwise(counts))


def _last_state(folder: Path) -> dict[str, Any]:
    """All that the last checkpoint holds: networks and optimizers."""
    checkpoints = folder.glob("checkpoints/checkpoint_*/about.json")
    last = max(checkpoints, key=lambda file: json.loads(file.read_text())["step"])
    return load_state(last.parent)[0]


def _differing(one: Any, other: Any, name: str = "state") -> list[str]:
    """Names of leaves that are not bit for bit the same."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, (dict, list, tuple)):
        mine, others = (tree if isinstance(tree, dict) else dict(enumerate(tree)) for tree in (one, other))
        if type(one) is not type(other) or mine.keys() != others.keys():
            return [name]
        return [leaf for key in mine for leaf in _differing(mine[key], others[key], f"{name}.{key}")]
    return [] if one == other else [name]


def _missing_in_mlflow(world: World, storage: Path, steps: dict[int, dict[str, Any]]) -> int:
    """Values of the step log that the run in MLflow lacks, or has otherwise."""
    client = client_of(world.server.uri)
    run = json.loads((storage / "chaos" / "run.json").read_text())["mlflow"]["pipeline"]
    missing = 0
    for key in _own(next(iter(steps.values()))["values"]):
        logged = {entry.step: entry.value for entry in client.get_metric_history(run, key)}
        missing += sum(logged.get(step) != line["values"].get(key) for step, line in steps.items())
    return missing


def _recovery(strikes: list[Strike]) -> dict[str, dict[str, Any]]:
    """Fault -> how often, and seconds until the next update after it was mended: alone, and with others meanwhile."""

    def of(seconds: list[float], value: Callable[[list[float]], float]) -> float | None:
        return round(value(seconds), 1) if seconds else None

    found = {}
    for fault in FAULTS:
        some = [strike for strike in strikes if strike.fault == fault]
        mended = [strike for strike in some if strike.recovered]
        seconds = [strike.recovered - strike.at for strike in mended]
        alone = [strike.recovered - strike.at for strike in mended if strike.alone]
        if some:
            found[fault] = {"kills": len(some), "alone_median_s": of(alone, median)}
            found[fault] |= {"median_s": of(seconds, median), "longest_s": of(seconds, max)}
    return found


def table(result: dict[str, Any]) -> str:
    """Recovery by kind of fault, and what the two runs differ in."""
    facts = (
        "an update of the quiet run (s, median) | {quiet_step_s:.2f}",
        "seconds, quiet and under faults | {quiet_s:.0f} and {chaos_s:.0f}",
        "tensors of the last checkpoint that differ from the quiet run's | {weights_differing}",
        "metrics that differ | {metrics_differing}",
        "prompts consumed, doubled, skipped | {prompts_consumed}, {prompts_doubled}, {prompts_skipped}",
        "updates done again | {steps_done_again}",
        "score requests, asked again, lost | {requests}, {requests_repeated}, {requests_lost}",
        "values missing in MLflow | {mlflow_values_missing}",
        "processes left over | {processes_left}",
        "Ray Train's cleaners left until the cluster ends | {ray_train_cleaners_left}",
    )
    counts = result | {name: len(value) for name, value in result.items() if isinstance(value, list)}
    recovery = markdown(
        "fault | times | seconds to the next update: alone | with others meanwhile | longest",
        "{fault} | {kills} | {alone_median_s:.1f} | {median_s:.1f} | {longest_s:.1f}",
        [{"fault": fault} | row for fault, row in result["recovery"].items()],
    )
    compared = markdown(f"{result['kills']} faults, {result['steps']} updates |", " |\n| ".join(facts), [counts])
    return f"{recovery}\n\n{compared}"
