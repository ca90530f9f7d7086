"""What a run says while it goes wrong: on the screen, in the run's tags, and in what a checkpoint keeps of its standing."""

from __future__ import annotations

from raydistill.config.schema import Config
from raydistill.evaluation.consistency import FALL_DB
from raydistill.shapes.judge import COLUMNS as OF_JUDGE
from raydistill.tracking.tracker import Tracker
from raydistill.workers.stage import Standing

# What the periodic evaluation falls below its best in a collapse: of the judge's shares, and of other metrics in standard
# deviations of single pictures (half of one is about 0.1 of the judge's mean as well).
FALL, FALL_IN_SPREADS = 0.1, 0.5


class Alarms:
    """Of one stage; each is said once."""

    def __init__(self, name: str, config: Config, tracker: Tracker, standing: Standing) -> None:
        self.name, self.config, self.tracker, self.standing = name, config, tracker, standing
        self._told_of_cuts = self._told_of_consistency = False

    def cuts(self, step: int, metrics: dict[str, float]) -> None:
        if metrics.get("data/cut_prompts") and not self._told_of_cuts:
            self._told_of_cuts = True
            print(
                f"{self.name}: update {step} has prompts that are longer than a text encoder reads; their ends are "
                "lost (data/cut_prompts counts them)",
                flush=True,
            )

    def collapse(self, step: int, reason: str | None) -> None:
        """Say once that the student collapses, on screen and in the run's tags; None: it does not, or no longer."""
        if reason is not None and self.standing.collapse is None:
            message = f"step {step}: {reason}"
            print(f"collapse alarm: {message}", flush=True)
            self.tracker.tags({"collapse_alarm": message})
        self.standing.collapse = None if reason is None else self.standing.collapse or f"step {step}: {reason}"

    def fall(self, step: int, value: float, spread: float) -> None:
        """The periodic evaluation is well below its best; `spread`: the metric's standard deviation over single pictures."""
        fall = FALL if self.config.evaluation.metric in OF_JUDGE else FALL_IN_SPREADS * spread
        if value < self.standing.best - fall:
            self.collapse(step, f"evaluation fell to {value:.3f} from {self.standing.best:.3f}")

    def plateau(self, step: int, values: list[float | None]) -> None:
        """Say that the metric no longer rises, where that ends the stage."""
        standing, allowed = self.standing, self.config.distill.stop_on_plateau
        noise = standing.observe(values)
        if allowed is None or standing.flat < allowed:
            standing.plateau = None
            return
        metric = self.config.evaluation.metric
        standing.plateau = (
            f"step {step}: {metric} has not risen above {standing.peak:.3f} by its noise ({noise:.3f}) in {standing.flat} "
            "evaluations"
        )
        print(f"{self.name}: plateau: {standing.plateau}", flush=True)
        self.tracker.tags({"plateau": standing.plateau})

    def consistency(self, step: int, found: float) -> None:
        """The student's picture is no longer the one that the teacher sees; `found`: dB."""
        best = self.standing.consistency
        self.standing.consistency = found if best is None else max(best, found)
        if found < self.standing.consistency - FALL_DB and not self._told_of_consistency:
            self._told_of_consistency = True
            message = (
                f"step {step}: bridge/consistency_psnr fell to {found:.1f} dB from {best:.1f}: the student's own decoder "
                "draws another picture than the one that the teacher sees"
            )
            print(f"consistency alarm: {message}", flush=True)
            self.tracker.tags({"consistency_alarm": message})
