"""What a student's quality costs: teacher forwards, by FLOPs, until it reaches a share of its teacher's attribute accuracy.

One factor at a time from the default of the shapes world: the fake score's kind, its updates per student update (k), the
GAN; and the recipe of DMD2: a full copy, k = 5, and a forward pass of its own for the discriminator's view of the
student's samples. Everything else (seeds, prompts, noise, learning rates) is equal. Each cell is a distillation in one
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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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

    def overrides(self) -> list[str]:
        gan = [] if self.gan else ["discriminator.weight=0"]
        return [f"fake_score.kind={self.kind}", f"fake_score.updates={self.k}", *gan]


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
    Variant(DMD2, kind="full", k=5, separate=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each cell")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.9],
        metavar="SHARE",
        help="of the teacher's accuracy, to be reached",
    )
    parser.add_argument("--most", type=int, default=160, help="student updates after which a cell gives up")
    parser.add_argument("--every", type=int, default=5, help="student updates between evaluations")
    parser.add_argument("--pictures", type=int, default=512, help="pictures of an evaluation")
    parser.add_argument("--parallel", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="variants whose name contains one of these")
    parser.add_argument("--no-real-size", action="store_true", help="leave out what an update costs at real size")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    variants = [v for v in VARIANTS if not arguments.only or any(text in v.name for text in arguments.only)]
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
        costs = {v.name: pool.submit(update_cost, v, "shapes") for v in variants}
        real = {} if arguments.no_real_size else {v.name: pool.submit(update_cost, v, REAL_PAIR) for v in variants}
        rows = [
            _row(v, [f.result() for f, c in waiting.items() if c.variant == v], shares, costs[v.name].result())
            | ({"real": real[v.name].result()} if real else {})
            for v in variants
        ]
    first = next(iter(waiting)).result()
    return {
        "rows": rows,
        "teacher": first["teacher"],
        "start": first["curve"][0][1],
        "seeds": arguments.seeds,
        "shares": shares,
        **settings,
    }


def _row(
    variant: Variant, cells: list[dict[str, Any]], shares: Sequence[float], cost: dict[str, float]
) -> dict[str, Any]:
    return asdict(variant) | {
        "updates": [[crossing(cell["curve"], share * cell["teacher"]) for cell in cells] for share in shares],
        "best": max(accuracy for cell in cells for _, accuracy in cell["curve"]),
        "miniature": cost,
    }


# -- one cell ---------------------------------------------------------------------------------------------


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
        return f"{'-'.join(words)}-{self.share:g}-seed{self.seed}.json"


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Distil until the student is good enough, or read what an earlier call has found of the same.

    Returns:
        `curve`: (updates, accuracy) of every evaluation; `teacher`: its accuracy.
    """
    import torch

    from raydistill.config.reading import CONFIGS, config_hash, load
    from raydistill.data.prompts import training_prompts
    from raydistill.distill.local import local_distillation
    from raydistill.distill.schedule import distillation_step
    from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator

    config = load(CONFIGS / "shapes.yaml", [f"run.seed={cell.seed}", *cell.variant.overrides()])
    file, key = folder / cell.file, {"config": config_hash(config), "files": _hashes(config, FILES_OF_CELL)}
    key |= json.loads(json.dumps(asdict(cell)))
    if file.is_file() and (known := json.loads(file.read_text()))["cell"] == key:
        return known
    torch.set_num_threads(1)
    distiller, scores = local_distillation(config)
    fixed = FixedPrompts(training_prompts(config), cell.pictures, config.evaluation.seed + 1)
    evaluator = StudentEvaluator(distiller.networks.student_space, fixed, config.evaluation, "cpu")
    teacher = _teacher_accuracy(config, scores, evaluator, folder / f"teacher-{cell.pictures}.json")

    def accuracy() -> float:
        return evaluator.accuracy(evaluator.draw(distiller.networks.evaluated, config.student.start_timestep))["mean"]

    curve = [[0, accuracy()]]
    while curve[-1][0] < cell.most and crossing(curve, cell.share * teacher) is None:
        for _ in range(cell.every):
            distillation_step(distiller, scores, config.fake_score.updates, overlap=False)
        curve.append([curve[-1][0] + cell.every, accuracy()])
    found = {"cell": key, "teacher": teacher, "curve": curve}
    _write(file, found)
    return found


def _hashes(config: Any, keys: Sequence[str]) -> dict[str, str]:
    """Of the contents of the files and folders that these keys of the configuration name."""
    from raydistill.config.reading import get
    from raydistill.storage.fingerprint import content_hash
    from raydistill.storage.resolve import resolve

    return {key: content_hash(resolve(path)) for key in keys if (path := get(config, key)) is not None}


def crossing(curve: Sequence[Sequence[float]], wanted: float) -> float | None:
    """Where a curve first reaches `wanted`, on the straight line between its points; None: nowhere."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y1 >= wanted:
            return x0 + (x1 - x0) * max(0.0, wanted - y0) / (y1 - y0) if y1 > y0 else float(x0)
    return None


def _teacher_accuracy(config: Any, scores: Any, evaluator: Any, file: Path) -> float:
    """Of the teacher's own multi-step pictures of the same prompts; kept in a file, for as long as nothing of it changes."""
    import torch

    from raydistill.config.reading import mathematical
    from raydistill.data.encode import PromptTable

    key = {name: value for name, value in mathematical(config).items() if name.partition(".")[0] in OF_TEACHER}
    key["files"] = _hashes(config, FILES_OF_TEACHER)
    if file.is_file() and (known := json.loads(file.read_text())).get("key") == key:
        return known["mean"]
    space, fixed = scores.space, evaluator.fixed
    table = PromptTable(space, fixed.captions)
    vae, pictures = space.load_vae(), []
    with torch.no_grad():
        for start, stop, captions in fixed.batches(config.evaluation.batch_size):
            latents = space.sample(
                scores.network, fixed.noise(space, start, stop), table(captions), scores.unconditional,
                config.teacher.sampling_steps, scores.guidance_scale,
            )  # fmt: skip
            pictures.append(space.decode(vae, latents))
    judged = evaluator.judge.accuracy(torch.cat(pictures), fixed.captions)
    _write(file, judged | {"key": key})
    return judged["mean"]


def _write(file: Path, content: dict[str, Any]) -> None:
    from raydistill.evaluation.summary import write_summary

    write_summary(file, content)


# -- what an update costs ---------------------------------------------------------------------------------


def update_cost(variant: Variant, name: str) -> dict[str, float]:
    """FLOPs of one student update of one worker, in unguided teacher forwards of one sample; counted on meta tensors.

    Args:
        name: of a configuration.
    """
    import torch

    from raydistill.config.reading import CONFIGS, load
    from raydistill.distill.networks import guidance_scale
    from raydistill.planning.counting import changed, count_teacher, count_trainer, distiller
    from raydistill.planning.meter import counted
    from raydistill.spaces.meta import empty_conditioning, open_space

    config = load(CONFIGS / f"{name}.yaml", variant.overrides())
    config = changed(config, gradient_checkpointing=False)  # what it computes twice is no work of the method
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    batch, k = config.distill.batch_size, config.fake_score.updates
    scale = guidance_scale(config, teacher)
    network, trainer = count_teacher(config, teacher, scale), count_trainer(config, student, teacher)
    forward = network.score.flops / network.samples / network.evaluations
    parts = {
        "make": trainer.make.flops,
        "fake": k * trainer.fake.flops,
        "student": trainer.student.flops,
        "teacher": batch * network.score.flops / network.samples,
    }
    if variant.separate and config.discriminator.weight > 0:
        with counted() as meter, torch.no_grad():
            fake = distiller(config, student, teacher, batch).fake
            inputs = torch.empty(batch, *teacher.latent_shape, device="meta"), torch.empty(batch, device="meta")
            conditioning = empty_conditioning(teacher.conditioning_layout, batch)
            parts["separate"] = k * meter.count(lambda: fake.features(*inputs, conditioning)).flops
    return {f"{part}_forwards": flops / forward for part, flops in parts.items()} | {
        "forwards": sum(parts.values()) / forward,
        "batch": batch,
    }


def table(result: dict[str, Any]) -> str:
    texts = [
        f"{share:.0%} of the teacher's {result['teacher']:.3f}:\n\n{_table(result, i)}"
        for i, share in enumerate(result["shares"])
    ]
    notes = (
        f"Until the mean attribute accuracy on {result['pictures']} pictures of training captions is that, from "
        f"{result['start']:.3f}; an evaluation every {result['every']} updates, {result['seeds']} seeds. Forwards: FLOPs of "
        "all networks, counted, in units of one unguided forward of the teacher on one sample, for each sample of the "
        "batch; evaluations and text encoders are left out. At real "
        f"size: the same recipe's update for {REAL_PAIR}, "
        "counted, times the miniature's number of updates; gradient checkpointing off."
    )
    return "\n\n".join([*texts, notes])


def _table(result: dict[str, Any], place: int) -> str:
    """Of one share."""
    from raydistill.benchmark.measure import markdown

    known = {row["name"]: row for row in result["rows"]}
    real = any("real" in row for row in result["rows"])

    def in_all(row: dict[str, Any], size: str) -> float | None:
        if None in row["updates"][place]:
            return None
        return statistics.fmean(row["updates"][place]) * row[size]["forwards"] / row[size]["batch"]

    def costs(row: dict[str, Any], size: str) -> list[str]:
        """Per sample of a batch."""
        found, reference = in_all(row, size), in_all(known[DMD2], size) if DMD2 in known else None
        return [
            f"{row[size]['forwards'] / row[size]['batch']:.1f}",
            "–" if found is None else f"{found:,.0f}",
            "–" if found is None or reference is None else f"{found / reference:.2f}",
        ]

    def updates(row: dict[str, Any]) -> str:
        counts = row["updates"][place]
        if None in counts:
            return f"not within {result['most']} (best {row['best']:.3f})"
        return f"{statistics.fmean(counts):.0f} ({', '.join(f'{count:.0f}' for count in counts)})"

    columns = ["variant", "student updates (seeds)", "forwards an update", "in all", "of DMD2's"]
    columns += ["at real size: an update", "in all", "of DMD2's"] if real else []
    rows = []
    for row in result["rows"]:
        cells = [row["name"], updates(row)]
        for size in ("miniature", "real") if real else ("miniature",):
            cells += costs(row, size)
        rows.append(cells)
    return markdown(columns, rows)
