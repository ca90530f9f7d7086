"""The paper's ablation of the Bridge: components, objective and architecture, one factor at a time.

Every variant gets the same pairs, steps and (nearly) the same number of trainable parameters; each is trained with
several seeds, as a Ray task of its own. A finished cell is a file, so an interrupted ablation goes on.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from raydistill.bridge.model import projector_parameters
from raydistill.bridge.trainer import build_trainer
from raydistill.config.networks import BridgeConfig
from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.spaces.base import Space
from raydistill.storage.atomic import replace_text, replacing
from raydistill.tracking.progress import write_progress
from raydistill.workers.bridge import CURVES, LOG_EVERY, MetricLog

METRICS = ("l1", "psnr", "ssim")


@dataclass(frozen=True)
class Variant:
    """One row of the tables, with the paper's L1, PSNR (dB) and SSIM of it (SD 2.1 -> SDXL, arXiv 2606.32020)."""

    name: str
    projector: str
    attention: bool
    prior: bool
    paper: tuple[float, float, float]


VARIANTS = (
    Variant("mlp", "mlp", True, False, (0.075, 19.46, 0.60)),
    Variant("unet", "unet", True, False, (0.040, 23.61, 0.68)),
    Variant("baseline", "swinir", False, False, (0.048, 22.6, 0.68)),
    Variant("attention", "swinir", True, False, (0.037, 24.39, 0.73)),
    Variant("l1-only", "swinir", False, True, (0.041, 23.58, 0.70)),
    Variant("full", "swinir", True, True, (0.035, 24.97, 0.75)),
)
TABLES = {  # the rows of each of the paper's tables; the paper does not say whether its "L1 only" has the prior
    "components": ("baseline", "attention", "full"),
    "objective": ("l1-only", "full"),
    "architecture": ("mlp", "unet", "attention"),
}


@dataclass(frozen=True)
class Cell:
    """One training of one variant."""

    variant: str
    seed: int
    config: dict[str, Any]  # of the whole run, with the variant's Bridge
    parameters: int  # trainable
    split_seed: int  # of the held-out pairs, the same ones for every cell

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


def cells(config: Config, student: Space, teacher: Space) -> list[Cell]:
    """All trainings of the ablation; `bridge.ablation_seeds` of each variant.

    The budget of parameters is that of the configured Bridge with prior; the other variants' widths are chosen to
    come as near to it as they can.
    """
    full = config.bridge.model_copy(update={"projector": "swinir", "prior": True})
    budget = projector_parameters(student, teacher, full)
    weight = config.bridge.attention.weight or 1.0
    found = []
    for variant in VARIANTS:
        bridge = config.bridge.model_copy(
            update={
                "projector": variant.projector,
                "prior": variant.prior,
                "attention": config.bridge.attention.model_copy(update={"weight": weight if variant.attention else 0}),
            }
        )
        bridge = _of_size(bridge, student, teacher, budget)
        for seed in range(config.bridge.ablation_seeds):
            changed = config.model_copy(
                update={"bridge": bridge, "run": config.run.model_copy(update={"seed": config.run.seed + seed})}
            )
            parameters = projector_parameters(student, teacher, bridge)
            found.append(Cell(variant.name, seed, changed.model_dump(), parameters, config.run.seed))
    return found


def _of_size(bridge: BridgeConfig, student: Space, teacher: Space, budget: int) -> BridgeConfig:
    """The same Bridge in the width whose number of trainable parameters is nearest to the budget."""
    multiple = bridge.heads if bridge.projector == "swinir" else 1

    def candidates() -> Iterator[tuple[int, BridgeConfig]]:
        width = multiple
        while True:
            candidate = bridge.model_copy(update={"embed_dim": width})
            parameters = projector_parameters(student, teacher, candidate)
            yield abs(parameters - budget), candidate
            if parameters > budget:
                return
            width += multiple

    return min(candidates(), key=lambda found: found[0])[1]


# -- one cell ---------------------------------------------------------------------------------------------


def result_file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def progress_file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.progress"


def train_cell(cell: Cell, pairs: str, folder: Path, tracking: tuple[str, str] | None) -> dict[str, Any]:
    """Train one cell, or go on with it from its last checkpoint, and write its result.

    Args:
        pairs: folder of the pair set.
        folder: on storage that every node sees.
        tracking: MLflow's URI and the cell's run; None: no logging.

    Returns:
        variant, seed, parameters, embed_dim, steps, seconds and the metrics of `BridgeTrainer.validation`.
    """
    config = validate(cell.config)
    torch.set_num_threads(config.distill.threads)
    device = torch.device("cuda" if config.distill.gpus_per_worker else "cpu")
    trainer = build_trainer(config, pairs, device, split_seed=cell.split_seed)
    state, steps, seconds, curves = folder / f"{cell.name}.pt", config.bridge.steps, 0.0, {}
    if state.is_file():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        seconds, curves = saved["seconds"], saved.get(CURVES, {})
        trainer.load_state_dict(saved)
    log, started = MetricLog(folder, *(tracking or (None, None)), curves), time.monotonic() - seconds
    try:
        while trainer.step_count < steps:
            losses = trainer.step(trainer.objective.batch(trainer.step_count))
            step = trainer.step_count
            if step % LOG_EVERY == 0 or step == steps:
                log.metrics(losses, step)
                write_progress(progress_file(folder, cell), step=step, total=steps)
            if step % config.bridge.checkpoint_every == 0 and step < steps:
                beside = {"seconds": time.monotonic() - started, CURVES: log.curves}
                with replacing(state) as fresh:  # a lost task may still be writing
                    torch.save(trainer.state_dict() | beside, fresh)
        seconds = time.monotonic() - started
        metrics, picture = trainer.validation()
        log.metrics(metrics, steps)
        log.image(picture, "reconstruction", steps)
    finally:
        log.close()
    about = {
        "variant": cell.variant, "seed": cell.seed, "parameters": cell.parameters,
        "embed_dim": config.bridge.embed_dim, "steps": steps, "seconds": round(seconds, 1), "metrics": metrics,
    }  # fmt: skip
    replace_text(result_file(folder, cell), json.dumps(about, indent=1))
    state.unlink(missing_ok=True)
    progress_file(folder, cell).unlink(missing_ok=True)
    return about


def steps_done(folder: Path, planned: Sequence[Cell], steps: int) -> int:
    """Steps taken by all cells together."""
    done = 0
    for cell in planned:
        if result_file(folder, cell).is_file():
            done += steps
            continue
        with contextlib.suppress(OSError, ValueError):  # not begun, or ended since
            done += json.loads(progress_file(folder, cell).read_text())["step"]
    return done


# -- the tables -------------------------------------------------------------------------------------------


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each variant's metrics, and how its order compares with the paper's."""
    rows = {}
    for variant in VARIANTS:
        own = [result for result in results if result["variant"] == variant.name]
        measured = {}
        for metric in METRICS:
            values = [result["metrics"][f"eval/{metric}"] for result in own]
            measured[metric] = {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
        rows[variant.name] = asdict(variant) | measured | {
            "seeds": len(own),
            "parameters": own[0]["parameters"],
            "embed_dim": own[0]["embed_dim"],
            "seconds": statistics.median(result["seconds"] for result in own),
        }  # fmt: skip
    orders = {}
    for table, names in TABLES.items():
        psnr = [rows[name]["psnr"]["mean"] for name in names]
        orders[table] = psnr == sorted(psnr)
    return {"rows": rows, "steps": results[0]["steps"], "paper_order": orders}


def markdown(summary: dict[str, Any]) -> str:
    """The tables as they stand in a README: measured beside the paper's."""
    lines = [
        "| table | variant | parameters | L1 | PSNR dB | SSIM | paper: L1 / PSNR / SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for table, names in TABLES.items():
        for name in names:
            row = summary["rows"][name]
            what = f"{row['projector']}, {'L1 + attention' if row['attention'] else 'L1'}"
            what += f", {'prior' if row['prior'] else 'no prior'}"
            values = [
                f"{row[metric]['mean']:.{digits}f} ± {row[metric]['std']:.{digits}f}"
                for metric, digits in (("l1", 4), ("psnr", 2), ("ssim", 3))
            ]
            paper = "{:.3f} / {:.2f} / {:.2f}".format(*row["paper"])
            lines.append(f"| {table} | {what} | {row['parameters']:,} | {' | '.join(values)} | {paper} |")
    return "\n".join(lines)
