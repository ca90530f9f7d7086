"""One small distillation twice, quietly and while its processes are killed, and every difference between the two.

The run lives on a cluster of its own (a head, and a node that is lost from time to time) and logs to an MLflow server.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from raydistill.benchmark.measure import markdown, median, option
from raydistill.benchmark.world import SPOT, World
from raydistill.tracking.store import client_of
from raydistill.workers.checkpoint import load_state
from raydistill.workers.step_log import consumed, read_lines, step_file, steps_of

# fault -> how Ray titles the processes that it ends; None: handled by the world itself
FAULTS: dict[str, str | None] = {
    "teacher rank": "ray::TeacherRank",
    "Serve replica": "ray::ServeReplica",
    "Serve controller": "ray::ServeController",
    "train worker": "ray::RayTrainWorker",
    "train controller": "ray::TrainController",
    "text encoder": "ray::MapWorker",
} | dict.fromkeys(("driver", "MLflow server", "node", "head node"))
RARE = ("driver", "node", "head node", "train controller", "Serve controller")  # slow to mend: once in two rounds
AWAY_S = 5.0  # how long the MLflow server stays away
PATIENCE_S = 240.0  # for a run to go on after a fault
LEFT_S = 20.0  # for processes to end by themselves
# what a cluster keeps for itself once it has run anything
CLUSTERS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor",
                "ray::_StatsActor", "ray::_UsageCollectionActor", "ray::ActorLocationTracker")  # fmt: skip
CLEANER = "ray::PlacementGroupCleaner"  # of Ray Train; outlives a killed controller (its exit fails in a thread)
OWN_TIMES = ("time/", "throughput/", "teachers/")  # metrics that two runs need not share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--kills", 30, "how many faults, at least")
    option(parser, "--steps", None, "student updates of the run; default: six a fault", type=int)
    option(parser, "--seed", 0, "of the choice of faults")
    option(parser, "--minutes", 8.0, "no further fault after that")
    option(parser, "--only", None, "only these kinds of fault", nargs="+", choices=FAULTS)


@dataclass(kw_only=True)
class Strike:
    """One fault and what became of it."""

    fault: str
    at: float
    step: int  # lines of the step log when it came
    ended: frozenset[int] = frozenset()  # pids of all processes of that kind
    back: float | None = None  # when what was ended was there again
    recovered: float | None = None  # when the next update after that was done
    alone: bool = True  # no other fault came before it was over


@dataclass(kw_only=True)
class Soak:
    """The run under faults."""

    world: World
    folder: Path  # of its stage
    start_driver: Callable[[], subprocess.Popen[bytes]]
    kills: int
    until: float
    faults: list[str]
    choice: random.Random
    strikes: list[Strike] = field(default_factory=list)
    starts: int = 0
    exits: list[int] = field(default_factory=list)  # codes of drivers that ended by themselves, unfinished
    repair: tuple[float, Callable[[], None]] | None = None  # when and how the MLflow server comes back

    def run(self) -> None:
        """Until the job has ended with 0.

        Faults come in waves of one to three, seconds apart; the next wave waits until an update is done again.

        Raises:
            RuntimeError: the run does not go on after a fault.
        """
        driver, deck, wave, next_at, next_line = self._start(), [], 0, 0.0, 1
        while (code := driver.poll()) != 0:
            if code is not None:
                if code > 0:
                    self.exits.append(code)
                driver = self._start()
            now, lines = time.monotonic(), self._lines()
            if self.repair is not None and now >= self.repair[0]:
                self.repair[1]()
                self.repair = None
            for strike in self._open():
                self._follow(strike, driver, lines)
            waiting = self._open()
            if waiting and now - waiting[-1].at > PATIENCE_S:
                raise RuntimeError(f"no update within {PATIENCE_S:.0f} s after this fault: {waiting[-1].fault}")
            more = len(self.strikes) < self.kills and now < self.until
            if more and not waiting and wave == 0 and lines >= next_line:
                wave, next_line = self.choice.choice((1, 2, 3)), lines + 1
            if more and wave > 0 and now >= next_at and (fault := self._draw(deck)) is not None:
                self._strike(fault, driver, lines)
                wave, next_at, next_line = wave - 1, now + self.choice.uniform(0.5, 3), lines + 2
            elif more and "text encoder" in deck and self.world.titled(FAULTS["text encoder"]):
                # it lives only until it has encoded everything, so it is struck whenever it is there
                deck.remove("text encoder")
                self._strike("text encoder", driver, lines)
            time.sleep(0.1)

    def _open(self) -> list[Strike]:
        """Faults after which no update was done yet."""
        return [strike for strike in self.strikes if strike.recovered is None]

    def _draw(self, deck: list[str]) -> str | None:
        """Take the first fault that has a victim; faults that have none stay."""
        for _ in range(2):
            for fault in deck:
                if fault == "MLflow server" and self.repair is not None:
                    continue  # away already
                if FAULTS[fault] is None or self.world.titled(FAULTS[fault]):
                    deck.remove(fault)
                    return fault
            deck += [fault for fault in self._round() if fault not in deck]
        return None

    def _round(self) -> list[str]:
        even = len(self.strikes) // max(1, len(self.faults)) % 2 == 0
        faults = [fault for fault in self.faults if even or fault not in RARE]
        self.choice.shuffle(faults)
        return faults or list(self.faults)

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        return self.start_driver()

    def _lines(self) -> int:
        file = step_file(self.folder, 0)
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def _strike(self, fault: str, driver: subprocess.Popen[bytes], lines: int) -> None:
        victims = self.world.titled(FAULTS[fault]) if FAULTS[fault] else []
        if FAULTS[fault]:
            try:
                self.choice.choice(victims).kill()
            except (IndexError, psutil.NoSuchProcess):  # it ended by itself since it was drawn
                return
        print(f"chaos: {len(self.strikes) + 1}/{self.kills} {fault}, after {lines} updates", flush=True)
        company = self._open()
        for other in company:
            other.alone = False
        ended = {driver.pid} if fault == "driver" else {victim.pid for victim in victims}  # of a group all are replaced
        at = time.monotonic()
        self.strikes.append(Strike(fault=fault, at=at, step=lines, ended=frozenset(ended), alone=not company))
        if fault in ("driver", "head node"):  # a driver runs on the head node
            driver.kill()
            driver.wait()
        if fault == "head node":
            self.world.lose_head()
        elif fault == "node":
            self.world.kill_node()
            self.world.add_node()
        elif fault == "MLflow server" and self.choice.random() < 0.5:
            self.world.server.signal(signal.SIGSTOP)
            self.repair = time.monotonic() + AWAY_S, lambda: self.world.server.signal(signal.SIGCONT)
        elif fault == "MLflow server":
            self.world.server.kill()
            self.repair = time.monotonic() + AWAY_S, self.world.server.launch

    def _follow(self, strike: Strike, driver: subprocess.Popen[bytes], lines: int) -> None:
        """See whether what was ended is back, and whether an update was done since."""
        if strike.back is None:
            if strike.fault == "driver":
                back = driver.pid not in strike.ended and driver.poll() is None
            elif strike.fault in ("node", "head node", "text encoder", "MLflow server"):
                back = True  # what was on it comes with the next update; the other two may not be needed for it
            else:
                back = any(process.pid not in strike.ended for process in self.world.titled(FAULTS[strike.fault]))
            if back:
                strike.back, strike.step = time.monotonic(), lines
        elif lines > strike.step:
            strike.recovered = time.monotonic()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs and their comparison; `passed` says whether there is no difference."""
    storage = Path(arguments.storage).absolute() / "benchmark" / time.strftime("chaos-%Y%m%d-%H%M%S")
    steps = arguments.steps or 6 * arguments.kills
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
            until=started + 60 * arguments.minutes,
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
        "quiet_step_s": round(median(line["values"]["time/step"] for line in _lines(storage, "quiet")), 3),
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
        "distill.max_failures=-1", "distill.cpus_per_worker=0.3", f"distill.node_labels={labels}",
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


def _lines(storage: Path, name: str) -> list[dict[str, Any]]:
    """The step log of a run."""
    return read_lines(step_file(storage / name / "distill", 0))


def _compare(world: World, storage: Path) -> dict[str, Any]:
    quiet, chaos = (_lines(storage, name) for name in ("quiet", "chaos"))
    ids, wanted = consumed(chaos).tolist(), set(consumed(quiet).tolist())
    first, second = steps_of(quiet), steps_of(chaos)
    one, other = (
        {(step, key): value for step, line in steps.items() for key, value in _own(line["values"]).items()}
        for steps in (first, second)
    )
    return {
        "weights_differing": _differing(*(_last_state(storage / name / "distill") for name in ("quiet", "chaos"))),
        "metrics_differing": sorted({key for (step, key), value in one.items() if other.get((step, key)) != value}),
        "steps_done": len(second),
        "steps_done_again": len(chaos) - len(second),
        "prompts_consumed": len(ids),
        "prompts_doubled": len(ids) - len(set(ids)),
        "prompts_skipped": len(wanted - set(ids)),
        "ids_changed_on_repeat": _changed_on_repeat(chaos),
        "requests": len(chaos),
        "requests_repeated": int(_repeated(chaos)),
        "requests_lost": len(first.keys() - second.keys()),  # an update waits for its answer: without one it is missing
        "mlflow_values_missing": _missing_in_mlflow(world, storage, second),
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
        mine, others = (part if isinstance(part, dict) else dict(enumerate(part)) for part in (one, other))
        if type(one) is not type(other) or mine.keys() != others.keys():
            return [name]
        return [leaf for key in mine for leaf in _differing(mine[key], others[key], f"{name}.{key}")]
    return [] if one == other else [name]


def _missing_in_mlflow(world: World, storage: Path, steps: dict[int, dict[str, Any]]) -> int:
    """Values of the step log that the run in MLflow lacks, or has otherwise."""
    client = client_of(world.server.uri)
    run = json.loads((storage / "chaos" / "run.json").read_text())["mlflow"]["distill"]
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
        "killed | times | seconds to the next update: alone | with others meanwhile | longest",
        "{fault} | {kills} | {alone_median_s:.1f} | {median_s:.1f} | {longest_s:.1f}",
        [{"fault": fault} | row for fault, row in result["recovery"].items()],
    )
    compared = markdown(f"{result['kills']} faults, {result['steps']} updates |", " |\n| ".join(facts), [counts])
    return f"{recovery}\n\n{compared}"
