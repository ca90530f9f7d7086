"""A run under faults: its processes are killed and frozen, one kind after another, and what becomes of it."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from raydistill.benchmark.world import World
from raydistill.workers.step_log import step_file

# fault -> how Ray titles the processes of which it meets one; None: handled by the world itself
FAULTS: dict[str, str | None] = {
    "teacher rank": "ray::TeacherRank",
    "Serve replica": "ray::ServeReplica",
    "Serve controller": "ray::ServeController",
    "train worker": "ray::RayTrainWorker",
    "train controller": "ray::TrainController",
    "text encoder": "ray::MapWorker",
    "freeze teacher rank": "ray::TeacherRank",
    "freeze train worker": "ray::RayTrainWorker",
} | dict.fromkeys(("driver", "MLflow server", "node", "head node", "freeze driver", "freeze raylet"))
FREEZE = "freeze "  # how the faults begin that stop a process for a while (SIGSTOP, SIGCONT) and end none
RARE = ("driver", "node", "head node", "train controller", "Serve controller")  # slow to mend: once in two rounds
AWAY_S = 5.0  # how long the MLflow server stays away
FROZEN_S = (2.0, 15.0)  # how long a process is frozen; Ray gives a raylet up after 50 s, a driver its lease after 30 s
PATIENCE_S = 240.0  # for a run to go on after a fault


@dataclass(kw_only=True)
class Strike:
    """One fault and what became of it."""

    fault: str
    at: float
    step: int  # lines of the step log when it came
    ended: frozenset[int] = frozenset()  # pids of all processes of that kind
    back: float | None = None  # when what was ended, or frozen, was there again
    recovered: float | None = None  # when the next update after that was done
    alone: bool = True  # no other fault came before it was over


@dataclass(kw_only=True)
class Repair:
    """What mends a fault that does not mend itself."""

    fault: str
    at: float
    mend: Callable[[], None]


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
    repairs: list[Repair] = field(default_factory=list)  # that are still to come

    def run(self) -> None:
        """Until the job has ended with 0.

        Faults come in waves of one to three, seconds apart; the next wave waits until an update is done again.

        Raises:
            RuntimeError: the run does not go on after a fault.
        """
        try:
            self._run()
        finally:
            self._mend(float("inf"))

    def _run(self) -> None:
        driver, deck, wave, next_at, next_line = self._start(), [], 0, 0.0, 1
        while (code := driver.poll()) != 0:
            if code is not None:
                if code > 0:
                    self.exits.append(code)
                driver = self._start()
            now, lines = time.monotonic(), self._lines()
            self._mend(now)
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

    def _mend(self, now: float) -> None:
        """Do every repair whose time has come."""
        due = [repair for repair in self.repairs if repair.at <= now]
        self.repairs = [repair for repair in self.repairs if repair.at > now]
        for repair in due:
            with contextlib.suppress(psutil.NoSuchProcess):  # another fault has ended what was frozen
                repair.mend()

    def _open(self) -> list[Strike]:
        """Faults after which no update was done yet."""
        return [strike for strike in self.strikes if strike.recovered is None]

    def _away(self, fault: str) -> bool:
        """Whether such a fault is not mended yet."""
        return any(repair.fault == fault for repair in self.repairs)

    def _draw(self, deck: list[str]) -> str | None:
        """Take the first fault that has a victim; faults that have none stay."""
        for _ in range(2):
            for fault in deck:
                if not self._away(fault) and (FAULTS[fault] is None or self.world.titled(FAULTS[fault])):
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
        """Let one fault happen, unless what it meets has ended by itself since it was drawn."""
        at = time.monotonic()
        try:
            victims = self._victims(fault, driver)
            if fault.startswith(FREEZE):
                victim = self.choice.choice(victims)
                victim.suspend()
                self.repairs.append(Repair(fault=fault, at=at + self.choice.uniform(*FROZEN_S), mend=victim.resume))
            elif FAULTS[fault]:
                self.choice.choice(victims).kill()
        except (IndexError, psutil.NoSuchProcess):
            return
        print(f"chaos: {len(self.strikes) + 1}/{self.kills} {fault}, after {lines} updates", flush=True)
        company = self._open()
        for other in company:
            other.alone = False
        ended = frozenset(victim.pid for victim in victims)  # of a group all are replaced
        self.strikes.append(Strike(fault=fault, at=at, step=lines, ended=ended, alone=not company))
        if fault in ("driver", "head node"):  # a driver runs on the head node
            driver.kill()
            driver.wait()
        if fault == "head node":
            self.world.lose_head()
        elif fault == "node":
            self.world.kill_node()
            self.world.add_node()
        elif fault == "MLflow server":
            server, frozen = self.world.server, self.choice.random() < 0.5
            server.signal(signal.SIGSTOP) if frozen else server.kill()
            mend = (lambda: server.signal(signal.SIGCONT)) if frozen else server.launch
            self.repairs.append(Repair(fault=fault, at=at + AWAY_S, mend=mend))

    def _victims(self, fault: str, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The processes of which the fault meets one; none where the world handles it."""
        if FAULTS[fault]:
            return self.world.titled(FAULTS[fault])
        if fault == "freeze raylet":
            return [self.world.raylet()]
        return [psutil.Process(driver.pid)] if fault in ("driver", "freeze driver") and driver.poll() is None else []

    def _follow(self, strike: Strike, driver: subprocess.Popen[bytes], lines: int) -> None:
        """See whether what was ended or frozen is back, and whether an update was done since."""
        if strike.back is None:
            if strike.fault.startswith(FREEZE):
                back = not self._away(strike.fault)
            elif strike.fault == "driver":
                back = driver.pid not in strike.ended and driver.poll() is None
            elif strike.fault in ("node", "head node", "text encoder", "MLflow server"):
                back = True  # what was on it comes with the next update; the other two may not be needed for it
            else:
                back = any(process.pid not in strike.ended for process in self.world.titled(FAULTS[strike.fault]))
            if back:
                strike.back, strike.step = time.monotonic(), lines
        elif lines > strike.step:
            strike.recovered = time.monotonic()
