"""What is counted of a configuration, as numbers. Needs no torch: kept counts are read in no time.

Bytes, FLOPs, and the public facts of the models. counting.py counts them, kept.py keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.config.reading import draws, needs_pairs, other_drawer, trains_bridge
from raydistill.config.schema import Config

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number, by the configuration's names

# -- parts of a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a piece of code did: floating point operations, the most live bytes during it, and how many of the operations
    were in float32.
    """

    flops: float
    peak: int
    flops_32: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of one trainer's state, which it holds between steps."""

    student: int  # with its EMA
    student_frozen: int  # of it, below a LoRA
    fake_frozen: int
    fake_block: int  # of it, its largest block
    fake_trained: int
    bridge: int
    discriminator: int
    optimizers: int
    reward: int = 0  # with the student's VAE decoder


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One worker's step: its state, and what make, one fake update and the student update do."""

    weights: Weights
    resident: int  # bytes between steps
    make: Cost
    fake: Cost
    student: Cost
    gradients: dict[str, int]  # bytes that are averaged over the workers, by optimizer
    checkpoint: int  # bytes of tensors in one

    @property
    def peak(self) -> int:
        return max(self.make.peak, self.fake.peak, self.student.peak)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen teacher: its size, and one forward of `samples` scored samples (two networks' rows with CFG)."""

    parameters: int
    buffers: int  # elements
    piece: int  # elements of the largest module that ZeRO-3 gathers at once
    samples: int
    score: Cost  # one guided x0 estimate; the peak is without weights
    evaluations: int  # rows the network sees for one sample: 2 with classifier-free guidance
    own_steps: int | None = None  # of a picture, for a step-distilled model
    large_linear: int = 0  # elements of the linear layers that teachers.quantize takes


@dataclass(frozen=True)
class BridgeTraining:
    """One Bridge step of one worker."""

    parameters: int  # of the projector, which is trained
    prior: int  # elements of the frozen decoder blocks
    probe: int  # elements of the teacher's first blocks
    step: Cost
    validation: Cost  # pictures through the teacher's VAE
    text: int  # bytes of the teacher's text encoders, which stay where the prompts are too many for a table

    @property
    def peak(self) -> float:
        """Most bytes of tensors at any time."""
        return max(self.step.peak, self.validation.peak) + self.text


@dataclass(frozen=True)
class Text:
    """A text encoder, and what one prompt of full length takes; the peak without weights, in float32."""

    parameters: int
    prompt: Cost
    chunk: int  # prompts that go through it at once, at most


@dataclass(frozen=True)
class Vae:
    """A VAE, and what encoding and decoding `batch` pictures take, as many as go through it at once; peaks without weights."""

    parameters: int
    side: int  # pixels of a picture's side
    batch: int
    encode: Cost
    decode: Cost


@dataclass(frozen=True)
class Terms:
    """Terms of a model that bind the student."""

    role: str
    model: str
    licence: str
    text: str
    gated: bool  # on the hub: its licence must be accepted first


@dataclass(frozen=True, kw_only=True)
class Models:
    """Facts of the models, and the bytes that travel between trainers and teachers."""

    student: str  # pipeline classes
    teacher: str
    terms: list[Terms]
    request_bytes: int
    answer_bytes: int
    real_row_bytes: int  # one teacher sample in a worker's memory: latents in 16 bits
    real_window_bytes: int  # most that a worker holds of them


# -- all of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Everything about a configuration that does not depend on the hardware. Bytes, FLOPs."""

    batch: int
    trainer: Trainer  # at `batch` samples
    small_batch: int
    small_trainer: Trainer  # at `small_batch` samples
    recomputing: Trainer  # at `batch`, with distill.gradient_checkpointing
    keeping: Trainer | None = None  # at `batch`, without it; None: `trainer` is
    small_keeping: Trainer | None = None  # at `small_batch`
    least: Trainer | None = None  # one sample a micro-batch, with all that saves memory and changes no number
    network: Teacher
    drawer: Teacher  # what draws pictures
    bridge: BridgeTraining | None  # one worker's share; None: nothing is trained
    text: dict[str, Text]  # "role part"
    vae: dict[str, Vae]  # by role
    models: Models

    @property
    def text_flops(self) -> float:
        """One prompt through the text encoders of student and teacher."""
        return sum(encoder.prompt.flops for name, encoder in self.text.items() if not name.startswith("drawer "))

    def drawer_text(self) -> dict[str, Text]:
        """The text encoders of what draws pictures."""
        return drawer_text(self.text)

    def texts_of_update(self, config: Config) -> float:
        """FLOPs of one worker's prompts, and with a GAN of as many captions as the fake score has prompts, for the teacher."""
        updates, fake = config.fake_score.updates, config.fake_score.batch_size or self.batch
        teacher = sum(encoder.prompt.flops for name, encoder in self.text.items() if name.startswith("teacher"))
        captions = updates * teacher if config.discriminator.weight > 0 else 0.0
        return self.batch * self.text_flops + fake * (updates * self.text_flops + captions)


def drawer_text(text: Mapping[str, Text]) -> dict[str, Text]:
    """Of all text encoders, those of what draws pictures: the drawer's own, else the teacher's."""
    own = {name: one for name, one in text.items() if name.startswith("drawer ")}
    return own or {name: one for name, one in text.items() if name.startswith("teacher ")}


def makes_pairs(config: Config) -> bool:
    """Whether a run makes pairs, of pictures that are drawn or of real images."""
    return config.bridge.pairs is None and needs_pairs(config)


def synthesises(config: Config) -> bool:
    """Whether a run makes any set."""
    return makes_pairs(config) or draws(config)


def pairs_made(config: Config) -> int:
    """Pairs that synthesis makes. Nobody counts real images beforehand: without a bound they are taken to be as many as samples."""
    synthesis = config.synthesis
    return synthesis.count if synthesis.images is None else synthesis.image_count or synthesis.count


def changed(config: Config, **distill: Any) -> Config:
    """The configuration with other values in its distill section."""
    return config.model_copy(update={"distill": config.distill.model_copy(update=distill)})


@dataclass(frozen=True)
class Wanted:
    """One thing to count.

    Args:
        kind: trainer, teacher, drawer, bridge, text, vae or models.
        batch: samples of a trainer's step.
    """

    kind: str
    config: Config
    batch: int = 0


GROWTH = ("small_trainer", "recomputing", "least")  # how a trainer's memory grows; no check that it fits needs them
FIELDS = (
    "trainer",
    *GROWTH,
    "keeping",
    "small_keeping",
    "network",
    "drawer",
    "bridge",
    "text",
    "vae",
    "models",
)  # of Counts, those that are counted


def wanted(config: Config, fields: Sequence[str] = FIELDS) -> dict[str, Wanted]:
    """What must be counted for these fields of Counts.

    Nothing is counted of a Bridge that is not trained, and nothing twice where trainers recompute already.
    """
    batch = config.distill.batch_size
    every = {
        "trainer": Wanted("trainer", config, batch),
        "small_trainer": Wanted("trainer", config, small_batch(config)),
        "recomputing": Wanted("trainer", changed(config, gradient_checkpointing=True), batch),
        "least": Wanted("trainer", least(config), LEAST_PARTS),
        "keeping": Wanted("trainer", changed(config, gradient_checkpointing=False), batch),
        "small_keeping": Wanted("trainer", changed(config, gradient_checkpointing=False), small_batch(config)),
        "network": Wanted("teacher", config),
        "drawer": Wanted("drawer", config),
        "bridge": Wanted("bridge", config),
        "text": Wanted("text", config),
        "vae": Wanted("vae", config),
        "models": Wanted("models", config),
    }
    alike = not other_drawer(config) and config.synthesis.guidance_scale is None
    recomputes = config.distill.gradient_checkpointing
    needless = {
        "bridge": not trains_bridge(config), "recomputing": recomputes, "keeping": not recomputes,
        "small_keeping": not recomputes, "drawer": alike,
    }  # fmt: skip
    return {name: it for name, it in every.items() if name in fields and not needless.get(name)}


LEAST_PARTS = 2  # of which `least` is counted: more of them need no more but their inputs


def least(config: Config) -> Config:
    """With micro-batches of one sample, activations recomputed, and a frozen copy in bfloat16 where that changes no number."""
    fake = config.fake_score
    if fake.kind == "lora" and config.distill.mixed_precision:
        fake = fake.model_copy(update={"base_dtype": "bfloat16"})
    small = changed(config, gradient_checkpointing=True, micro_batches=LEAST_PARTS, batch_size=LEAST_PARTS)
    return small.model_copy(update={"fake_score": fake})


def small_batch(config: Config) -> int:
    """A second batch size, by which it is seen how memory grows: two samples a micro-batch, or one where it has two.

    Of one sample attention copies less than its share: what is transposed to another order of a dimension of 1 stays.
    """
    batch, micro_batches = config.distill.batch_size, config.distill.micro_batches
    return micro_batches if batch == 2 * micro_batches else 2 * micro_batches


def as_counts(config: Config, found: dict[str, Any]) -> Counts:
    """Args: found: every field that `wanted` names."""
    rest = {"bridge": None, "recomputing": found["trainer"], "drawer": found["network"]}
    return Counts(batch=config.distill.batch_size, small_batch=small_batch(config), **rest | found)
