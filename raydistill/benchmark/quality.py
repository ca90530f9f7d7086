"""What a student's quality costs: teacher forwards, by FLOPs, until it reaches a share of its teacher's attribute accuracy.

One factor at a time from the default of the shapes world: the fake score's kind, its updates per student update (k), the
GAN, the student's steps and its start; and the recipe of DMD2: a full copy, k = 5, and a forward pass of its own for the
discriminator's view of the student's samples. Everything else (seeds, prompts, noise, learning rates) is equal. Each cell is a distillation in one
process, with the run's own Distiller and schedule; FLOPs are those of its networks, counted. The student is judged on
training prompts, as settings may not be chosen on the held-out ones. Cells that are done are kept: the same command goes on,
and does again those whose configuration, weights or data have changed since.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from raydistill.benchmark.measure import markdown, option
from raydistill.benchmark.models import score_inputs
from raydistill.config import reading
from raydistill.config.schema import Config
from raydistill.data.prompts import training_prompts
from raydistill.distillation.local import LocalScores, local_distillation
from raydistill.distillation.networks import guidance_scale
from raydistill.distillation.schedule import distillation_step
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator, draw_teacher
from raydistill.evaluation.metrics import reward_places
from raydistill.evaluation.summary import write_summary
from raydistill.pictures.grids import grid
from raydistill.planning.counting import count_teacher, count_trainer, distiller
from raydistill.planning.counts import changed
from raydistill.planning.meter import counted
from raydistill.spaces.meta import open_space
from raydistill.storage.fingerprint import content_hash
from raydistill.storage.resolve import resolve

REAL_PAIR = "sd35_medium_sd15"  # what an update costs at real size is counted for this one
OF_TEACHER = ("teacher", "prompts", "evaluation")  # sections of the configuration that decide the teacher's accuracy
FILES_OF_TEACHER = ("teacher.model", "prompts.path", "evaluation.judge")  # and the files that they name
FILES_OF_CELL = (*FILES_OF_TEACHER, "student.model", "student.unet", "bridge.checkpoint", "discriminator.real_data")


@dataclass(frozen=True)
class Variant:
    """A recipe: what differs between the cells, said whole."""

    name: str
    kind: str = "lora"  # fake_score.kind
    k: int = 2  # fake_score.updates
    gan: bool = True
    separate: bool = False  # the discriminator sees the student's samples in a forward pass of its own
    more: tuple[str, ...] = ()  # further keys

    def overrides(self) -> list[str]:
        gan = [] if self.gan else ["discriminator.weight=0"]
        return [f"fake_score.kind={self.kind}", f"fake_score.updates={self.k}", *gan, *self.more]


SHOWN = 48  # pictures in a cell's grid
FALLING = ("distill.schedule=cosine", "distill.steps=160")
DEFAULT, DMD2 = "default: lora, k = 2, GAN", "DMD2's: full, k = 5, separate passes"
VARIANTS = (
    Variant(DEFAULT),
    Variant("fake score full", kind="full"),
    Variant("fake score truncated", kind="truncated"),
    Variant("k = 1", k=1),
    Variant("k = 5", k=5),
    Variant("k = 10", k=10),
    Variant("fake score truncated, k = 1", kind="truncated", k=1),
    Variant("no GAN", gan=False),
    Variant("standardised features", more=("discriminator.standardize=true",)),
    Variant("several depths", more=("discriminator.depths=[0.5,0.75,0.99]",)),
    Variant("approximate R1", more=("discriminator.r1_weight=1",)),
    Variant("stepped together", more=("discriminator.step_together=true",)),
    Variant("student of two steps", more=("student.steps=2",)),
    Variant("student of four steps", more=("student.steps=4",)),
    Variant("raw start", more=("student.unet=null",)),
    Variant("raw start, two steps", more=("student.unet=null", "student.steps=2")),
    Variant("raw start, four steps", more=("student.unet=null", "student.steps=4")),
    *(
        Variant(f"falling rates, k = 1, t to {t_max}", k=1, more=(*FALLING, f"vsd.t_max={t_max}"))
        for t_max in (0.98, 0.8, 0.6)
    ),
    Variant(DMD2, kind="full", k=5, separate=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--seeds", 2, "seeds of each cell")
    option(parser, "--shares", [0.9], "of the teacher's accuracy, to be reached", nargs="+", metavar="SHARE")
    option(parser, "--most", 160, "student updates after which a cell gives up")
    option(parser, "--every", 5, "student updates between evaluations")
    option(parser, "--pictures", 512, "pictures of an evaluation")
    option(parser, "--parallel", 2, "cells at once, one thread each")
    option(parser, "--only", None, "variants whose name contains one of these", nargs="*", metavar="TEXT")
    option(
        parser,
        "--more",
        None,
        "keys that every cell sets besides, such as reward.weight=0.1",
        nargs="*",
        metavar="KEY=VALUE",
    )
    option(parser, "--no-real-size", False, "leave out what an update costs at real size")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    variants = [v for v in VARIANTS if not arguments.only or any(text in v.name for text in arguments.only)]
    if more := tuple(arguments.more or ()):
        variants = [replace(v, name=f"{v.name}, {', '.join(more)}", more=(*v.more, *more)) for v in variants]
    folder = arguments.storage / "benchmark" / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    shares = sorted(arguments.shares)
    settings = {"share": shares[-1]} | {name: getattr(arguments, name) for name in ("most", "every", "pictures")}
    cells = [Cell(variant, seed, **settings) for seed in range(arguments.seeds) for variant in variants]
    with ProcessPoolExecutor(arguments.parallel, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_cell, cell, folder): cell for cell in cells}
        for done in tqdm(as_completed(waiting), total=len(cells), desc="quality", unit="cell", disable=None):
            cell, found = waiting[done], done.result()
            updates = crossing(found["curve"], cell.share * found["teacher"])
            reached = f"{updates:.0f} updates" if updates else f"not within {cell.most} updates"
            tqdm.write(f"{cell.variant.name}, seed {cell.seed}: {reached}")
        sizes = {"miniature": "shapes"} | ({} if arguments.no_real_size else {"real": REAL_PAIR})
        costs = {v: {size: pool.submit(update_cost, v, name) for size, name in sizes.items()} for v in variants}
        rows = []
        for v in variants:
            done = [future.result() for future, cell in waiting.items() if cell.variant == v]
            updates = [[crossing(cell["curve"], share * cell["teacher"]) for cell in done] for share in shares]
            best = max(accuracy for cell in done for _, accuracy in cell["curve"])
            cost = {size: future.result() for size, future in costs[v].items()}
            rows.append(asdict(v) | {"updates": updates, "best": best, "last": [cell["last"] for cell in done]} | cost)
    first = next(iter(waiting)).result()
    common = {"teacher": first["teacher"], "start": first["curve"][0][1], "seeds": arguments.seeds, "shares": shares}
    return {"rows": rows} | common | settings


@dataclass(frozen=True)
class Cell:
    """One distillation."""

    variant: Variant
    seed: int
    share: float
    most: int
    every: int
    pictures: int

    @property
    def file(self) -> str:
        words = "".join(c if c.isalnum() else " " for c in self.variant.name).split()
        return f"{'-'.join(words)[:150]}-{self.share:g}-seed{self.seed}.json"


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Distil until the student is good enough, or read what an earlier call has found of the same.

    Returns:
        `curve`: (updates, accuracy) of every evaluation; `last`: all that the judge says of the last; `teacher`: its accuracy.
        Its pictures lie beside the file.
    """
    config = reading.load(reading.CONFIGS / "shapes.yaml", [f"run.seed={cell.seed}", *cell.variant.overrides()])
    file, key = folder / cell.file, {"config": reading.config_hash(config), "files": _hashes(config, FILES_OF_CELL)}
    places = reward_places(config)
    key["files"] |= {f"reward {name}": content_hash(Path(place)) for name, place in (places or {}).items()}
    key |= json.loads(json.dumps(asdict(cell)))
    if file.is_file() and (known := json.loads(file.read_text()))["cell"] == key:
        return known
    torch.set_num_threads(1)
    distiller, scores = local_distillation(config, places)
    fixed = FixedPrompts(training_prompts(config), cell.pictures, config.evaluation.seed + 1)
    evaluator = StudentEvaluator(distiller.networks.student_space, fixed, config.evaluation, "cpu")
    teacher = _teacher_accuracy(config, scores, evaluator, folder / f"teacher-{cell.pictures}.json")

    def judged() -> tuple[torch.Tensor, dict[str, float]]:
        drawn = evaluator.draw(distiller.networks.evaluated, config.student.start_timestep, config.student.steps)
        return drawn, evaluator.accuracy(drawn)

    pictures, last = judged()
    curve = [[0, last["mean"]]]
    while curve[-1][0] < cell.most and crossing(curve, cell.share * teacher) is None:
        for _ in range(cell.every):
            distillation_step(distiller, scores, config.fake_score.updates, overlap=False)
        pictures, last = judged()
        curve.append([curve[-1][0] + cell.every, last["mean"]])
    found = {"cell": key, "teacher": teacher, "curve": curve, "last": last}
    title = f"{cell.variant.name}, seed {cell.seed}, after {curve[-1][0]} updates"
    grid(pictures[:SHOWN], fixed.captions[:SHOWN], title=title).save(file.with_suffix(".png"))
    write_summary(file, found)
    return found


def _hashes(config: Config, keys: Sequence[str]) -> dict[str, str]:
    """Of the contents of the files and folders that these keys of the configuration name."""
    return {key: content_hash(resolve(path)) for key in keys if (path := reading.get(config, key)) is not None}


def crossing(curve: Sequence[Sequence[float]], wanted: float) -> float | None:
    """Where a curve first reaches `wanted`, on the straight line between its points; None: nowhere."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y1 >= wanted:
            return x0 + (x1 - x0) * max(0.0, wanted - y0) / (y1 - y0) if y1 > y0 else float(x0)
    return None


def _teacher_accuracy(config: Config, scores: LocalScores, evaluator: StudentEvaluator, file: Path) -> float:
    """Of the teacher's own multi-step pictures of the same prompts; kept in a file, for as long as nothing of it changes."""
    key = {name: value for name, value in reading.mathematical(config).items() if name.partition(".")[0] in OF_TEACHER}
    key["files"] = _hashes(config, FILES_OF_TEACHER)
    if file.is_file() and (known := json.loads(file.read_text())).get("key") == key:
        return known["mean"]
    _, judged = draw_teacher(scores.generate, scores.space, evaluator.fixed, config, scores.guidance_scale)
    write_summary(file, judged | {"key": key})
    return judged["mean"]


def update_cost(variant: Variant, name: str) -> dict[str, float]:
    """FLOPs of one student update of one worker, in unguided teacher forwards of one sample; counted on meta tensors.

    Args:
        name: of a configuration.
    """
    config = reading.load(reading.CONFIGS / f"{name}.yaml", variant.overrides())
    config = changed(config, gradient_checkpointing=False)  # what it computes twice is no work of the method
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    batch, k = config.distill.batch_size, config.fake_score.updates
    scale = guidance_scale(config, teacher)
    network, trainer = count_teacher(config, teacher, scale), count_trainer(config, student, teacher)
    forward = network.score.flops / network.samples / network.evaluations
    flops = {
        "make": trainer.make.flops,
        "fake": k * trainer.fake.flops,
        "student": trainer.student.flops,
        "teacher": batch * network.score.flops / network.samples,
    }
    if variant.separate and config.discriminator.weight > 0:
        with counted() as meter, torch.no_grad():
            fake = distiller(config, student, teacher, batch).networks.fake
            x_t, t_B, conditioning, _ = score_inputs(teacher, batch, device="meta")
            flops["separate"] = k * meter.count(lambda: fake.features(x_t, t_B, conditioning)).flops
    each = {f"{phase}_forwards": count / forward for phase, count in flops.items()}
    return each | {"forwards": sum(flops.values()) / forward, "batch": batch}


def table(result: dict[str, Any]) -> str:
    texts = [
        f"{share:.0%} of the teacher's {result['teacher']:.3f}:\n\n{_table(result, i)}"
        for i, share in enumerate(result["shares"])
    ]
    notes = (
        f"Until the mean attribute accuracy on {result['pictures']} pictures of training captions is that, from "
        f"{result['start']:.3f}; an evaluation every {result['every']} updates, {result['seeds']} seeds. Forwards: FLOPs of "
        "all networks, counted, in units of one unguided forward of the teacher on one sample, for each sample of the "
        f"batch; evaluations and text encoders are left out. At real size: the same recipe's update for {REAL_PAIR}, "
        "counted, times the miniature's number of updates; gradient checkpointing off."
    )
    return "\n\n".join([*texts, notes])


def _table(result: dict[str, Any], column: int) -> str:
    """Of one share."""
    known = {row["name"]: row for row in result["rows"]}
    sizes = [size for size in ("miniature", "real") if size in result["rows"][0]]

    def in_all(row: dict[str, Any], size: str) -> float | None:
        if None in row["updates"][column]:
            return None
        return statistics.fmean(row["updates"][column]) * row[size]["forwards"] / row[size]["batch"]

    def costs(row: dict[str, Any], size: str) -> tuple[float | None, ...]:
        """Of an update, in all, and of DMD2's; per sample of a batch."""
        found, reference = in_all(row, size), in_all(known[DMD2], size) if DMD2 in known else None
        share = None if found is None or reference is None else found / reference
        return row[size]["forwards"] / row[size]["batch"], found, share

    def updates(row: dict[str, Any]) -> str:
        counts = row["updates"][column]
        if None in counts:
            return f"not within {result['most']} (best {row['best']:.3f})"
        return f"{statistics.fmean(counts):.0f} ({', '.join(f'{count:.0f}' for count in counts)})"

    columns = "variant | student updates (seeds) | forwards an update | in all | of DMD2's"
    columns += " | at real size: an update | in all | of DMD2's" if "real" in sizes else ""
    rows = [
        (row["name"], updates(row), *(cell for size in sizes for cell in costs(row, size))) for row in result["rows"]
    ]
    return markdown(columns, "{} | {}" + " | {:.1f} | {:,.0f} | {:.2f}" * len(sizes), rows)
