"""One distillation, as the driver hands it to its workers, and where it stands."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from raydistill.config.stages import DistillConfig
from raydistill.storage.atomic import read_json
from raydistill.storage.lease import Lease
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place
from raydistill.workers.adoption import Runs, mark


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One distillation: the main one, or a control. Its whole behaviour follows from its configuration."""

    name: str
    config: dict[str, Any]
    folder: str  # of this stage, on storage that every node sees
    bridge: str | None = None  # trained Bridge; None for the identity
    real: str | None = None  # parquet of teacher samples
    pairs: str | None = None  # parquet of pairs that anchor a Bridge trained along
    service: str | None = None  # name of the teacher service; None when VSD is off
    mlflow_uri: str
    mlflow_run: str
    runs: Runs = ()  # ids of the run, its own first; its checkpoints bear one of them
    lease: Lease | None = None  # under which workers write

    def path(self, *names: str) -> Place:
        return functools.reduce(operator.truediv, names, to_place(self.folder))

    def result(self) -> dict[str, Any]:
        return read_json(self.path("result.json"), "remove it, and the stage ends again from its last checkpoint")


@dataclass(kw_only=True)
class Standing:
    """Where a stage stands; part of every checkpoint (`about.json`)."""

    step: int = 0  # student updates that are done
    best: float = float("-inf")  # score of the best student
    score: float = 0.0  # of the last evaluation
    stopped: str | None = None  # the collapse that ended the stage
    collapse: str | None = None  # the alarm, while it lasts
    plateau: str | None = None  # why the score counts as one that no longer rises
    peak: float | None = None  # score that has last risen by more than its noise
    peak_scores: list[float | None] | None = None  # of its pictures, one by one
    flat: int = 0  # evaluations since
    consistency: float | None = None  # the highest bridge/consistency_psnr so far, dB
    final_s: float = 0.0  # that the evaluation of the start took, and the one at the end will; 0: not known

    @classmethod
    def of(cls, about: dict[str, Any]) -> Standing:
        """Of a checkpoint, which an earlier version may have written."""
        lasting = {name: about.get(name) for name in ("stopped", "collapse", "plateau", "peak", "consistency")}
        later = {name: about[name] for name in ("final_s", "flat", "peak_scores") if name in about}
        return cls(step=about["step"], best=about["best"], score=about["score"], **lasting, **later)

    def observe(self, values: list[float | None]) -> float:
        """Count the evaluations since the mean score has last risen by more than the standard error of its rise.

        Every evaluation draws the same prompts from the same noise. So the rise is the mean of each picture's own rise,
        and its error has no part of what makes pictures differ from each other.

        Args:
            values: of the pictures of this evaluation; None: the metric has no number for it.

        Returns:
            The standard error; where the pictures of the peak are not known, that of the mean score.
        """
        known = [mean for mean in values if mean is not None]
        mean = math.fsum(known) / len(known)
        if self.peak is None:
            self.peak, self.peak_scores, self.flat = mean, values, 0
            return 0.0
        pairs = zip(values, self.peak_scores or [], strict=False)
        rises = [now - then for now, then in pairs if now is not None and then is not None]
        rise, of = (math.fsum(rises) / len(rises), rises) if rises else (mean - self.peak, known)
        noise = statistics.stdev(of) / math.sqrt(len(of)) if len(of) > 1 else 0.0
        if rise > noise:
            self.peak, self.peak_scores, self.flat = mean, values, 0
        else:
            self.flat += 1
        return noise

    def ended(self, distill: DistillConfig) -> str | None:
        """Why the stage has ended early, where the configuration lets it."""
        if self.stopped is None or self.stopped != self.plateau:
            return self.stopped if distill.stop_on_collapse else None
        return self.stopped if distill.stop_on_plateau is not None and self.flat >= distill.stop_on_plateau else None

    def about(self, mlflow_run: str, runs: Runs = ()) -> dict[str, Any]:
        known = asdict(self)
        later = {
            "final_s": 0.0,
            "plateau": None,
            "peak": None,
            "peak_scores": None,
            "flat": 0,
            "consistency": None,
        }  # as in checkpoints of earlier versions
        known = {name: value for name, value in known.items() if name not in later or value != later[name]}
        return known | {"mlflow_run": mlflow_run} | mark(runs)
