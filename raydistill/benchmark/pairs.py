"""How many pairs a Bridge needs, and of what: its fidelity, and the accuracy of the student that learns through it.

For each source, number of pairs and seed a Bridge of the miniature world is trained for the same number of steps. Its
fidelity is measured on teacher samples that no set has, and on what a student draws while it learns: blends, off-colour
pictures, and what the student's VAE draws from latents that no encoder gave. Then the default distillation runs with it,
in one process, and the student's last weights are judged on held-out captions. What is done is kept in results.jsonl,
and the same command goes on. Sources: teacher, renders, pictures, mix, and NAME+ with changed rows (pair_sets.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from raydistill.benchmark.measure import markdown, option
from raydistill.benchmark.pair_sets import BESIDE, MIX, PLAIN, SAMPLES, Sets, stored
from raydistill.bridge.model import Bridge
from raydistill.bridge.trainer import build_trainer
from raydistill.config import reading
from raydistill.config.schema import Config
from raydistill.data.pairs import PairSet
from raydistill.data.prompts import held_out_prompts
from raydistill.distillation.local import local_distillation
from raydistill.distillation.schedule import distillation_step
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.pictures.fidelity import psnr
from raydistill.spaces import load_space
from raydistill.storage.atomic import replace_text
from raydistill.storage.fingerprint import content_hash
from raydistill.storage.json_lines import lines_of
from raydistill.storage.resolve import path_argument, resolve

SHIPPED = "shipped"  # the Bridge that comes with the world, for comparison
SETS_SEED = 7  # of the sets, whatever the cells' seeds
DECODED_AT_ONCE = 16
ACCURACY = "accuracy"
SPACES = ("student.model", "teacher.model")
FILES = (*SPACES, "student.unet", "discriminator.real_data", "evaluation.judge", "evaluation.prompts", "prompts.path")

Values = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--sizes", [250, 1000, 4000, 8000], "numbers of pairs", metavar="PAIRS")
    option(parser, "--sources", [*PLAIN, MIX], "what the pairs are of; NAME+: changed", metavar="SOURCE")
    option(parser, "--seeds", 3, "seeds of each Bridge")
    option(parser, "--students", 3, "of these, how many also teach a student")
    option(parser, "--student-sizes", None, "numbers of pairs whose Bridges do; none: all", nargs="*", type=int)
    option(parser, "--images", None, "folder of real pictures, for `pictures`", type=path_argument, metavar="FOLDER")
    option(parser, "--augment", 0.5, "share of the rows that are changed in NAME+ and in the mix", metavar="SHARE")
    option(parser, "--steps", 800, "of a Bridge's training")
    option(parser, "--batch", 24, "pairs of a step", metavar="PAIRS")
    option(parser, "--updates", 120, "of a student")
    option(parser, "--held-out", 256, "teacher samples that fidelity is measured on")
    option(parser, "--pictures", 512, "pictures of a student's evaluation")
    option(parser, "--parallel", 2, "cells at once, one thread each")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = (arguments.storage / "benchmark" / "pairs").resolve()
    config, share, count = _config(0), arguments.augment, max(arguments.sizes)
    teacher, student = (load_space(resolve(model)) for model in (config.teacher.model, config.student.model))
    sets = Sets(folder / "sets", teacher, student, count=count, images=arguments.images, share=share, seed=SETS_SEED)
    bridges = _bridges(arguments, sets, folder)
    sizes = arguments.sizes if arguments.student_sizes is None else arguments.student_sizes
    taught = [b for b in bridges if b.seed < arguments.students and (b.source == SHIPPED or b.size in sizes)]
    students = [Student(bridge, arguments.updates, arguments.pictures) for bridge in taught]
    bridges = [bridge for bridge in bridges if bridge.source != SHIPPED or bridge.seed == 0]  # it is always the same
    results = Results(folder / "results.jsonl")
    with ProcessPoolExecutor(arguments.parallel, mp_context=get_context("spawn")) as pool:
        for name, cells in (("Bridges", bridges), ("students", students)):
            waiting = {pool.submit(cell.run): cell for cell in cells if results.of(cell) is None}
            first = len(cells) - len(waiting)
            for done in tqdm(as_completed(waiting), desc=name, initial=first, total=len(cells), disable=None):
                results.add(waiting[done], done.result())
                tqdm.write(f"{waiting[done]}: {results.shown(waiting[done])}")
    rows = [{"source": b.source, "pairs": b.size, "seed": b.seed} | results.of(b) for b in bridges]
    rows += [
        {"source": s.bridge.source, "pairs": s.bridge.size, "seed": s.bridge.seed} | results.of(s) for s in students
    ]
    images = "crops of three photographs" if arguments.images is None else f"the folder {arguments.images.name}"
    settings = ("augment", "steps", "batch", "updates", "held_out", "pictures")
    return {"rows": rows, "images": images} | {name: getattr(arguments, name) for name in settings}


def _bridges(arguments: argparse.Namespace, sets: Sets, folder: Path) -> list[BridgeCell]:
    """All of the first seed, then of the next; last the shipped one. Makes the sets."""
    measured = {name: stored(folder / "measured" / name, pairs) for name, pairs in sets.measured(arguments.held_out)}
    subsets = {}
    for source in tqdm(arguments.sources, desc="sets", disable=None):
        pairs = sets.make(source)
        tqdm.write(f"{source}: {len(pairs)} pairs")
        for size in sorted(arguments.sizes):
            if size <= len(pairs):
                subsets[source, size] = stored(folder / "subsets" / f"{source}-{size}", pairs.rows(range(size)))
            else:
                tqdm.write(f"{source}: there are no {size} pairs, so this cell is left out")
    known = {"measured": measured, "folder": folder / "bridges"}
    trained = known | {"steps": arguments.steps, "batch": arguments.batch}
    shipped = known | {"source": SHIPPED, "size": 0, "steps": 0, "batch": 0, "subset": None}
    cells = [
        BridgeCell(source=source, size=size, seed=seed, subset=subset, **trained)
        for seed, ((source, size), subset) in itertools.product(range(arguments.seeds), subsets.items())
    ]
    return cells + [BridgeCell(seed=seed, **shipped) for seed in range(max(1, arguments.students))]


def _config(seed: int, *more: str) -> Config:
    return reading.load(reading.CONFIGS / "shapes.yaml", [f"run.seed={seed}", *more])


def _hashes(config: Config, keys: Sequence[str]) -> dict[str, str]:
    """Of the contents of the files and folders that these keys name."""
    return {key: content_hash(resolve(reading.get(config, key))) for key in keys}


# -- cells --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BridgeCell:
    """A Bridge, trained on `subset` of a set, or the shipped one.

    Attributes:
        subset, measured: (folder, hash) of pairs.
        folder: of all Bridges.
    """

    source: str
    size: int
    seed: int
    steps: int
    batch: int
    subset: tuple[str, str] | None
    measured: dict[str, tuple[str, str]]
    folder: Path

    def __str__(self) -> str:
        return SHIPPED if self.subset is None else f"{self.source}, {self.size} pairs, seed {self.seed}"

    @cached_property
    def config(self) -> Config:
        if self.subset is None:
            return _config(0)
        training = (f"bridge.steps={self.steps}", f"bridge.batch_size={self.batch}")
        return _config(self.seed, *training, "bridge.checkpoint=null")

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides its numbers."""
        config = self.config
        files = _hashes(config, SPACES if self.subset else (*SPACES, "bridge.checkpoint"))
        pairs = {name: digest for name, (_, digest) in self.measured.items()}
        pairs |= {"training": self.subset[1]} if self.subset else {}
        identity = {"source": self.source, "size": self.size, "seed": self.seed}
        return identity | {"config": reading.config_hash(config), "files": files, "pairs": pairs}

    @property
    def place(self) -> str:
        """Folder of the Bridge, which is there once it is trained; the shipped one's name."""
        if self.subset is None:
            return self.config.bridge.checkpoint
        return str(self.folder / f"{self.source}-{self.size}-seed{self.seed}-{_digest(self.key)}")

    def make(self) -> None:
        if self.subset is None or Path(self.place).is_dir():
            return
        trainer = build_trainer(self.config, self.subset[0])
        for step in range(self.steps):
            trainer.step(trainer.objective.batch(step))
        trainer.bridge.save(self.place)

    @torch.no_grad()
    def run(self) -> Values:
        """PSNR of D_T(ẑ_T) to D_T(z_T), in dB."""
        torch.set_num_threads(1)
        with torch.enable_grad():
            self.make()
        student, teacher = (load_space(resolve(reading.get(self.config, key))) for key in SPACES)
        bridge, vae = Bridge.load(self.place, student, teacher), teacher.load_vae()

        def fidelity(folder: str) -> float:
            rows = PairSet(folder).rows(range(len(PairSet(folder))))
            found = [
                psnr(teacher.decode(vae, bridge(z_student.float())), teacher.decode(vae, z_teacher.float()))
                for z_student, z_teacher in zip(
                    rows.z_student.split(DECODED_AT_ONCE), rows.z_teacher.split(DECODED_AT_ONCE), strict=True
                )
            ]
            return float(torch.cat(found).mean())

        return {name: fidelity(folder) for name, (folder, _) in self.measured.items()}


@dataclass(frozen=True)
class Student:
    """The default distillation through a Bridge."""

    bridge: BridgeCell
    updates: int
    pictures: int

    def __str__(self) -> str:
        return f"student of {self.bridge}" + ("" if self.bridge.subset else f", seed {self.bridge.seed}")

    @cached_property
    def config(self) -> Config:
        return _config(self.bridge.seed, f"bridge.checkpoint={self.bridge.place}")

    @cached_property
    def key(self) -> dict[str, Any]:
        """Without the Bridge's place, which is a folder of the user."""
        config = _config(self.bridge.seed)
        identity = {"updates": self.updates, "pictures": self.pictures, "seed": self.bridge.seed}
        files = {"config": reading.config_hash(config), "files": _hashes(config, FILES)}
        return {"bridge": self.bridge.key, "student": identity | files}

    def run(self) -> Values:
        """Mean attribute accuracy on held-out captions, of the student's last weights."""
        torch.set_num_threads(1)
        self.bridge.make()
        config = self.config
        distiller, scores = local_distillation(config)
        for _ in range(self.updates):
            distillation_step(distiller, scores, config.fake_score.updates, overlap=False)
        fixed = FixedPrompts(held_out_prompts(config), self.pictures, config.evaluation.seed)
        evaluator = StudentEvaluator(distiller.networks.student_space, fixed, config.evaluation, "cpu")
        pictures = evaluator.draw(distiller.networks.evaluated, config.student.start_timestep, config.student.steps)
        return {ACCURACY: evaluator.accuracy(pictures)["mean"]}


def _digest(key: Mapping[str, Any]) -> str:
    return blake2b(_text(key).encode(), digest_size=6).hexdigest()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


class Results:
    """What was measured, in one file: a line a cell, which is known by its key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = lines_of(file.read_text()) if file.is_file() else []
        self._found: dict[str, Values] = {_text(line["cell"]): line["found"] for line in map(json.loads, lines)}

    def of(self, cell: BridgeCell | Student) -> Values | None:
        """None: it is not measured yet."""
        return self._found.get(_text(cell.key))

    def shown(self, cell: BridgeCell | Student) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.of(cell).items())

    def add(self, cell: BridgeCell | Student, values: Values) -> None:
        self._found[_text(cell.key)] = values
        lines = [json.dumps({"cell": json.loads(key), "found": found}) for key, found in self._found.items()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, "\n".join(lines) + "\n")


# -- the table ----------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    cells = list(dict.fromkeys((row["source"], row["pairs"]) for row in result["rows"]))
    rows = []
    for source, pairs in cells:
        found = [row for row in result["rows"] if (row["source"], row["pairs"]) == (source, pairs)]
        values = [[row[name] for row in found if name in row] for name in (SAMPLES, BESIDE, ACCURACY)]
        numbers = [_mean(some, digits) for some, digits in zip(values, (2, 2, 3), strict=True)]
        rows.append((source, f"{pairs:,}" if pairs else "–", *numbers))
    columns = "pairs of | pairs | PSNR, teacher samples | PSNR, beside them | student's accuracy"
    notes = (
        f"A Bridge is trained for {result['steps']} steps of {result['batch']} pairs. PSNR in dB: on {result['held_out']} teacher samples of held-out "
        f"captions, and on blends, off-colour pictures and other latents made of them. Accuracy: of the student after "
        f"{result['updates']} updates, on {result['pictures']} pictures of held-out captions. Means ± standard deviations; "
        f"in brackets the number of seeds. NAME+, mix: {result['augment']:.0%} of the rows are changed. "
        f"pictures: {result['images']}. shipped: the world's own Bridge, of 8,192 pairs and 2,000 steps."
    )
    return f"{markdown(columns, '{} | {} | {} | {} | {}', rows)}\n\n{notes}"


def _mean(values: Sequence[float], digits: int) -> str | None:
    """None where there are none."""
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread} ({len(values)})"
