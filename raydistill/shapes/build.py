"""Training of the miniature world, stage by stage, seeded and resumable.

    judge, text, teacher_vae, student_vae -> flux, sd15 -> sd15_start -> samples -> bridge

Every stage writes one finished folder under `weights/` and is skipped when that folder is there; an interrupted
stage goes on from its last training state. The renders' captions never include a held-out one.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel

from raydistill.bridge.loop import build_trainer
from raydistill.bridge.model import Bridge
from raydistill.config import CONFIGS, Config, load, validate
from raydistill.data.pairs import existing_shards, read_pairs, write_pairs
from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.data.synthesis import LocalTeacher, PairEncoder, resized, synthesise
from raydistill.diffusion.noise import normal
from raydistill.diffusion.path import add_noise, expand, target
from raydistill.distill.distiller import Distiller, Made
from raydistill.distill.schedule import distillation_step
from raydistill.distill.student import one_step_x0
from raydistill.shapes import WEIGHTS, miniatures
from raydistill.shapes.captions import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    corrupt,
    evaluation_captions,
    sample_scene,
    single_scenes,
)
from raydistill.shapes.judge import Judge
from raydistill.shapes.render import render
from raydistill.spaces import Conditioning, Space, load_space

CORRUPTION = 0.55  # share of attributes redrawn in the captions of weak students
START_GUIDANCE = 1.0  # of the weak student when it distils itself into its one-step start
SAMPLE_STEPS = 12
SAMPLE_GUIDANCE = 3.0  # of the teacher's samples
CAPTION_DROPOUT = 0.1  # share of empty captions, for classifier-free guidance


@dataclass
class Build:
    """Where things go and how long they take."""

    work: Path  # training states, deleted when a stage ends
    weights: Path = WEIGHTS
    seed: int = 0
    scale: float = 1.0  # of every stage's number of steps; tests use a tiny one
    renders: int = 24000  # cached latents per diffusion model

    def steps(self, full: int) -> int:
        return max(2, round(full * self.scale))


def scenes_for(step: int, count: int, seed: int, two_objects: float = 0.25) -> list[Scene]:
    """The training scenes of one step: a pure function of seed and step."""
    rng = random.Random(f"{seed}/{step}")
    return [sample_scene(rng, held_out=False, two_objects=two_objects) for _ in range(count)]


def fit(
    build: Build,
    name: str,
    model: nn.Module,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    steps: int,
    lr: float,
    ema_decay: float = 0.999,
    save_every: int = 250,
) -> nn.Module:
    """Train `model` with AdamW, warm-up and cosine decay, and return its exponential moving average.

    `loss(step, generator)` must depend on nothing random but the generator, so that a resumed run is the same run.
    """
    folder = build.work / name
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(model).eval()
    start = 0
    if (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    warmup = min(200, steps // 10 + 1)
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=None, mininterval=5)
    running = None
    for step in bar:
        progress = step / steps
        factor = min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * torch.cos(torch.tensor(progress * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr * max(factor, 0.02)
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + step)
        value = loss(step, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
            for mean, new in zip(average.buffers(), model.buffers(), strict=True):
                mean.copy_(new)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            folder.mkdir(parents=True, exist_ok=True)
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, folder / "state.tmp")
            (folder / "state.tmp").replace(folder / "state.pt")
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": running}) + "\n")
    return average.requires_grad_(False)


# -- judge and text encoders ---------------------------------------------------------------------------


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur (down to half size and back) and noise, so that the judge also reads imperfect pictures."""
    blur = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    mix = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.15
    return torch.lerp(images, blur, mix) + noise * torch.rand(len(images), 1, 1, 1, generator=generator)


def build_judge(build: Build) -> None:
    torch.manual_seed(build.seed)
    judge = Judge()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"judge/{build.seed}/{step}")
        scenes = [sample_scene(rng) for _ in range(64)]
        return judge.loss(degrade(render(scenes, (64, 32)[step % 2], step), generator), scenes)

    fit(build, "judge", judge, loss, build.steps(2500), 2e-3).save(build.weights / "judge")


class _AttributeReader(nn.Module):
    """Text encoder with a linear read-out of all attributes of both objects: how the encoders learn to read."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(miniatures.TEXT_WIDTH, 2 * (len(SIZES) + len(COLORS) + len(SHAPES) + len(POSITIONS)) + 4)


def attribute_vector(scene: Scene) -> torch.Tensor:
    """Multi-hot target of `_AttributeReader`: each object's attributes by its slot, then background, then count."""
    parts = []
    for slot in range(2):
        item = scene.objects[slot] if slot < len(scene.objects) else None
        for name, choices in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("position", POSITIONS)):
            parts += [float(item is not None and getattr(item, name) == choice) for choice in choices]
    return torch.tensor(parts + [float(scene.background == b) for b in BACKGROUNDS] + [float(len(scene.objects) == 2)])


def build_text(build: Build) -> None:
    """Pretrain the miniature CLIP and T5 encoders to read captions (real ones arrive pretrained, too)."""
    clip_tokenizer, t5_tokenizer = miniatures.clip_tokenizer(), miniatures.t5_tokenizer()
    torch.manual_seed(build.seed)
    encoders = {
        "clip": (clip_tokenizer, miniatures.clip_text_encoder(clip_tokenizer)),
        "t5": (t5_tokenizer, miniatures.t5_text_encoder(t5_tokenizer)),
    }
    for name, (tokenizer, encoder) in encoders.items():
        reader = _AttributeReader(encoder)

        def loss(step: int, generator: torch.Generator, tokenizer=tokenizer, reader=reader) -> torch.Tensor:
            rng = random.Random(f"text/{build.seed}/{step}")
            scenes = [sample_scene(rng, two_objects=0.5) for _ in range(64)]
            tokens = tokenizer(
                [s.caption for s in scenes], padding="max_length", max_length=20, truncation=True, return_tensors="pt"
            )
            if isinstance(reader.encoder, CLIPTextModel):
                features = reader.encoder(tokens.input_ids).pooler_output
            else:
                features = reader.encoder(tokens.input_ids).last_hidden_state.mean(1)
            wanted = torch.stack([attribute_vector(s) for s in scenes])
            return F.binary_cross_entropy_with_logits(reader.head(features), wanted)

        trained = fit(build, f"text_{name}", reader, loss, build.steps(1500), 2e-3).encoder
        tokenizer.save_pretrained(build.weights / "text" / name / "tokenizer")
        trained.half().save_pretrained(build.weights / "text" / name / "encoder")


def text_parts(build: Build, name: str) -> tuple:
    """(tokenizer, encoder) that `build_text` wrote."""
    from transformers import T5EncoderModel, T5Tokenizer

    tokenizer_class, encoder_class = {
        "clip": (miniatures.CLIPTokenizer, CLIPTextModel),
        "t5": (T5Tokenizer, T5EncoderModel),
    }[name]
    folder = build.weights / "text" / name
    return tokenizer_class.from_pretrained(folder / "tokenizer"), encoder_class.from_pretrained(folder / "encoder")


# -- VAEs ------------------------------------------------------------------------------------------------


def _build_vae(build: Build, name: str, vae: nn.Module, pixels: int, shift: bool, steps: int) -> None:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images = render(scenes_for(step, 8, build.seed), pixels, step)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        edges = sum(
            (torch.diff(reconstruction, dim=d) - torch.diff(images, dim=d)).abs().mean() for d in (2, 3)
        )  # sharp contours, where the shape is told
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        fidelity = F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images)
        return fidelity + 0.5 * edges + 1e-4 * kl

    trained = fit(build, name, vae, loss, build.steps(steps), 2e-3, ema_decay=0.995)
    with torch.no_grad():
        images = render(scenes_for(10**6, 512, build.seed), pixels, 10**6)
        latents = torch.cat([trained.encode(part).latent_dist.mode() for part in images.split(64)])
    offset = latents.mean().item() if shift else 0.0
    trained.register_to_config(scaling_factor=1 / (latents - offset).std().item(), shift_factor=offset or None)
    trained.half().save_pretrained(build.weights / "vae" / name)


def build_teacher_vae(build: Build) -> None:
    torch.manual_seed(build.seed)
    _build_vae(build, "teacher_vae", miniatures.teacher_vae(), 64, shift=True, steps=2000)


def build_student_vae(build: Build) -> None:
    torch.manual_seed(build.seed + 1)
    _build_vae(build, "student_vae", miniatures.student_vae(), 32, shift=False, steps=4500)


# -- diffusion models -------------------------------------------------------------------------------------


def cached(file: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors computed once and kept in a safetensors file."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in make().items()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return load_file(file)


def render_latents(build: Build, space: Space, corruption: float) -> tuple[torch.Tensor, list[str], list[str]]:
    """Latents of `build.renders` training renders [N, C, H, W], their captions, and those captions corrupted."""
    count = max(64, round(build.renders * min(1.0, build.scale)))
    chunks = [scenes_for(10**7 + i, 64, build.seed) for i in range(-(-count // 64))]

    @torch.no_grad()
    def make() -> dict[str, torch.Tensor]:
        vae = space.load_vae()
        bar = tqdm(enumerate(chunks), total=len(chunks), desc="encode renders", disable=None, mininterval=5)
        parts = [space.encode(vae, render(scenes, space.resolution, 10**7 + i)) for i, scenes in bar]
        return {"latents": torch.cat(parts)}

    latents = cached(build.work / f"latents_{space.pipeline_class}.safetensors", make)["latents"]
    rng = random.Random(f"corrupt/{build.seed}")
    scenes = [scene for chunk in chunks for scene in chunk]
    return latents, [s.caption for s in scenes], [corrupt(s, corruption, rng).caption for s in scenes]


def encode_unique(space: Space, captions: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Conditioning of each distinct caption once, the empty one at row 0, and the row of each caption."""
    unique = ["", *dict.fromkeys(captions)]
    text = space.load_text()
    parts = [space.encode_prompts(text, unique[i : i + 256]) for i in range(0, len(unique), 256)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, {c: i for i, c in enumerate(unique)}


def train_diffusion(
    build: Build,
    name: str,
    space: Space,
    network: nn.Module,
    steps: int,
    lr: float,
    corruption: float = 0.0,
    batch: int = 32,
    logit_normal: bool = False,
) -> nn.Module:
    """Denoising pre-training on renders, in the network's native prediction.

    With `corruption` the captions of the last third of the steps are corrupted: the network has learned to read, and
    learns not to rely on it.
    """
    latents, *captions = render_latents(build, space, corruption)
    table, row_of = encode_unique(space, captions[0] + captions[1])
    clean, corrupted = (torch.tensor([row_of[c] for c in some]) for some in captions)
    corrupt_from = build.steps(round(steps * 2 / 3))

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        row = torch.where(drop, 0, (corrupted if step >= corrupt_from else clean)[pick])
        noise = torch.randn(latents[pick].shape, generator=generator)
        t_B = torch.rand(batch, generator=generator)
        if logit_normal:
            t_B = torch.sigmoid(torch.randn(batch, generator=generator) + 0.4)
        x_t = add_noise(space.path, latents[pick], noise, t_B)
        prediction = space.predict(network, x_t, t_B, {k: v[row] for k, v in table.items()})
        error = prediction - target(space.path, space.prediction, latents[pick], noise, t_B)
        if space.prediction == "epsilon":
            # as the error of v: otherwise noisy times, where the caption decides the picture, hardly count
            error = error / expand(space.path.alpha_sigma(t_B)[0], error)
        return error.square().mean()

    return fit(build, name, network, loss, build.steps(steps), lr)


def _write_flux(build: Build, network: nn.Module) -> None:
    clip_tokenizer, clip = text_parts(build, "clip")
    t5_tokenizer, t5 = text_parts(build, "t5")
    vae = miniatures.AutoencoderKL.from_pretrained(build.weights / "vae" / "teacher_vae")
    FluxPipeline(miniatures.flow_scheduler(), vae, clip, clip_tokenizer, t5, t5_tokenizer, network).to(
        torch.float16
    ).save_pretrained(build.weights / "flux")


def build_flux(build: Build) -> None:
    """FLUX-style teacher on clean captions."""
    torch.manual_seed(build.seed + 2)
    network = miniatures.flux_transformer()
    _write_flux(build, copy.deepcopy(network))  # so that its Space can be read; the weights follow
    space = load_space(build.weights / "flux")
    trained = train_diffusion(build, "flux", space, network, 6000, 1.5e-3, logit_normal=True)
    _write_flux(build, trained)


def _write_sd15(build: Build, folder: str, unet: nn.Module) -> None:
    tokenizer, encoder = text_parts(build, "clip")
    vae = miniatures.AutoencoderKL.from_pretrained(build.weights / "vae" / "student_vae")
    StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, miniatures.student_scheduler(), None, None, requires_safety_checker=False
    ).to(torch.float16).save_pretrained(build.weights / folder)


def build_sd15(build: Build) -> None:
    """SD 1.5-style student on corrupted captions: it draws well, but not what was asked."""
    torch.manual_seed(build.seed + 3)
    unet = miniatures.student_unet()
    _write_sd15(build, "sd15", copy.deepcopy(unet))
    space = load_space(build.weights / "sd15")
    trained = train_diffusion(build, "sd15", space, unet, 5400, 1e-3, corruption=CORRUPTION)
    _write_sd15(build, "sd15", trained)


def report(build: Build, images: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Judge's table of some pictures."""
    judge = Judge.load(build.weights / "judge")
    tables = [judge.accuracy(images, captions)]
    return {k: round(v, 3) for k, v in tables[0].items()}


@torch.no_grad()
def evaluate_pipeline(build: Build, folder: str, count: int, steps: int, guidance_scale: float) -> dict[str, float]:
    """Judge's accuracy of a multi-step model on held-out captions."""
    space = load_space(build.weights / folder)
    network, vae, text = space.load_network(), space.load_vae(), space.load_text()
    captions = evaluation_captions(count)
    generator = torch.Generator().manual_seed(1)
    images = []
    for start in range(0, count, 64):
        part = captions[start : start + 64]
        noise = torch.randn(len(part), *space.latent_shape, generator=generator)
        conditioning = space.encode_prompts(text, part)
        empty = space.unconditional(space.encode_prompts(text, [""]))
        latents = space.sample(network, noise, conditioning, empty, steps, guidance_scale)
        images.append(space.decode(vae, latents))
    return report(build, torch.cat(images), captions)


# -- prompts, one-step start, teacher samples, Bridge ---------------------------------------------------------


def build_prompts(build: Build) -> None:
    """Prompt files: every training one-object caption and half as many two-object ones; the held-out captions."""
    singles = [scene.caption for scene in single_scenes(held_out=False)]
    rng, pairs = random.Random(build.seed), {}
    while len(pairs) < len(singles) // 2:
        pairs[sample_scene(rng, held_out=False, two_objects=1.0).caption] = None
    build.weights.mkdir(parents=True, exist_ok=True)
    (build.weights / "prompts.txt").write_text("\n".join([*singles, *pairs]) + "\n")
    held_out = dict.fromkeys(evaluation_captions(len(single_scenes(held_out=True))))
    (build.weights / "heldout.txt").write_text("\n".join(held_out) + "\n")


def training_prompts(build: Build) -> PromptSet:
    return read_prompts(build.weights / "prompts.txt", "prompt", "fail", 200)


def start_config(build: Build) -> Config:
    """Shared-space DMD of the weak student from itself."""
    model = str(build.weights / "sd15")
    return validate(
        {
            "student": {"model": model, "unet": None, "lr": 5e-5},
            "teacher": {"model": model, "guidance_scale": START_GUIDANCE},
            "bridge": {"projector": "identity", "checkpoint": None},
            "fake_score": {"kind": "full", "lr": 1e-4, "updates": 4},
            "discriminator": {"weight": 0},
            "evaluation": {"judge": str(build.weights / "judge")},
        }
    )


def build_sd15_start(build: Build) -> None:
    """One-step start of the weak student: first its own sampler's pictures by regression, then shared-space DMD."""
    space = load_space(build.weights / "sd15")
    prompts = training_prompts(build)
    table, row_of = encode_unique(space, prompts.prompts)
    unet = space.load_network()
    count = max(64, round(4096 * min(1.0, build.scale)))
    captions = prompts.at(build.seed, range(count))[1]
    rows = torch.tensor([row_of[c] for c in captions])

    @torch.no_grad()
    def make() -> dict[str, torch.Tensor]:
        noises, latents = [], []
        for start in tqdm(range(0, count, 128), desc="sample weak student", disable=None):
            ids = range(start, min(start + 128, count))
            noise = normal(build.seed, ids, space.latent_shape, "start")
            conditioning = {k: v[rows[list(ids)]] for k, v in table.items()}
            noises.append(noise)
            latents.append(space.sample(unet, noise, conditioning, {}, 20, 1.0))
        return {"noise": torch.cat(noises), "latents": torch.cat(latents)}

    pairs = cached(build.work / "sd15_ode.safetensors", make)
    start = copy.deepcopy(unet).train().requires_grad_(True)
    last = space.path.num_train_timesteps - 1

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(count, (32,), generator=generator)
        conditioning = {k: v[rows[pick]] for k, v in table.items()}
        return F.mse_loss(one_step_x0(space, start, pairs["noise"][pick], conditioning, last), pairs["latents"][pick])

    regressed = fit(build, "sd15_regression", start, loss, build.steps(1500), 5e-4)
    distiller = Distiller(
        start_config(build),
        space,
        space,
        regressed,
        Bridge.create(space, space, start_config(build).bridge),
        space.load_network(),
        None,
        _local_batches(build, prompts, table, row_of),
    )
    scores = LocalScores(space, unet, {k: v[:1] for k, v in table.items()}, START_GUIDANCE)
    for _ in tqdm(range(build.steps(100)), desc="sd15_start", disable=None):
        distillation_step(distiller, scores, 4, overlap=False)
    distiller.student.half().save_pretrained(build.weights / "sd15-onestep" / "unet")


def _local_batches(build: Build, prompts: PromptSet, table: dict, row_of: dict[str, int]) -> Iterator[dict]:
    """What `conditioned_batches` gives, without Ray, for a student that is its own teacher."""
    for slot in itertools.count():
        positions = range(slot * 32, slot * 32 + 32)
        rows = [row_of[c] for c in prompts.at(build.seed, positions)[1]]
        columns = {f"{role}.{k}": v[rows].numpy() for role in ("student", "teacher") for k, v in table.items()}
        yield {"sample_id": list(positions)} | columns


class LocalScores:
    """Teacher in this process, with the interface of the service's client."""

    def __init__(self, space: Space, network: nn.Module, unconditional: Conditioning, guidance_scale: float) -> None:
        self.space, self.network = space, network
        self.unconditional, self.guidance_scale = unconditional, guidance_scale

    def __call__(self, made: Made) -> LocalScores:
        self._made = made
        return self

    @torch.no_grad()
    def result(self) -> torch.Tensor:
        made = self._made
        return self.space.predict_x0(
            self.network, made.x_t, made.t_B, made.teacher_conditioning, self.unconditional, self.guidance_scale
        )


def build_samples(build: Build) -> None:
    """Teacher-sampled sets: a small one that is shipped, and a larger one to train the Bridge on."""
    teacher, student = load_space(build.weights / "flux"), load_space(build.weights / "sd15")
    heldout = {scene.caption for scene in single_scenes(held_out=True)}
    local = LocalTeacher(teacher, teacher.load_network())
    for folder, count, seed in (
        (build.weights / "samples" / "flux", 512, build.seed),
        (build.work / "pairs_flux", max(64, round(1024 * min(1.0, build.scale))), build.seed + 1),
    ):
        synthesise(
            local,
            teacher,
            student,
            training_prompts(build),
            folder,
            count=count,
            batch_size=64,
            shard_size=256,
            steps=SAMPLE_STEPS,
            guidance_scale=SAMPLE_GUIDANCE,
            seed=seed,
            forbidden=heldout,
        )


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures between and beside the given ones [B, 3, S, S]: two of them blended in soft regions, colours mixed.

    A student under training draws such pictures, and a Bridge that has never seen them would change their colours, so
    that the teacher judges other pictures than the student's.
    """
    count, pixels = len(images), images.shape[-1]

    def smooth(channels: int, cells: int) -> torch.Tensor:
        coarse = torch.randn(count, channels, cells, cells, generator=generator)
        return F.interpolate(coarse, size=(pixels, pixels), mode="bicubic")

    other = images[torch.randperm(count, generator=generator)]
    share = torch.sigmoid(3 * smooth(1, 3) + 2 * torch.randn(count, 1, 1, 1, generator=generator))
    blended = torch.lerp(images, other, share)
    turn = torch.eye(3) + 0.5 * torch.randn(count, 3, 3, generator=generator) * torch.rand(
        count, 1, 1, generator=generator
    )
    mottle = 0.15 * smooth(3, 8) * torch.rand(count, 1, 1, 1, generator=generator)
    return (torch.einsum("bij,bjhw->bihw", turn, blended) + mottle).clamp(-1, 1)


@torch.no_grad()
def build_varied_pairs(build: Build, folder: Path, count: int) -> None:
    """Pairs for the Bridge: a quarter teacher samples; then varied pictures; then what the student's VAE draws from
    latents that no encoder gave, as a student under training makes them."""
    teacher, student = load_space(build.weights / "flux"), load_space(build.weights / "sd15")
    samples = read_pairs(build.work / "pairs_flux")
    encoder, teacher_vae, student_vae = PairEncoder(teacher, student), teacher.load_vae(), student.load_vae()
    shard = 512
    for index in tqdm(range(-(-count // shard)), desc="varied pairs", disable=None):
        if index in existing_shards(folder):
            continue
        generator = torch.Generator().manual_seed(build.seed * 1_000_003 + index)
        rows = samples.rows(torch.randint(len(samples), (shard,), generator=generator).tolist())
        images = torch.cat([teacher.decode(teacher_vae, part.float()) for part in rows.z_T.split(32)])
        plain, pictures, beside = images.tensor_split([shard // 4, shard * 9 // 16])
        z_T, z_S, pngs = encoder.encode(torch.cat([plain, vary(pictures, generator)]))
        latents = rows.z_S[-len(beside) :].float()
        other = latents[torch.randperm(len(latents), generator=generator)]
        share, strength = torch.rand(2, len(latents), 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        latents = torch.lerp(latents, other, share**3) + 0.6 * strength * noise
        drawn = torch.cat([student.decode(student_vae, part) for part in latents.split(32)])
        beside_T, _, beside_pngs = encoder.encode(resized(drawn, teacher.resolution))
        z_T, z_S = torch.cat([z_T, beside_T]), torch.cat([z_S, latents])
        write_pairs(folder, index, rows.prompts, rows.ids, [build.seed] * shard, z_T, z_S, pngs + beside_pngs)


def build_bridge(build: Build) -> None:
    """The shipped Bridge: configs/shapes.yaml's, on teacher samples and varied ones, by the same trainer as a job."""
    pairs = build.work / "pairs_varied"
    build_varied_pairs(build, pairs, max(512, round(8192 * min(1.0, build.scale))))
    config = load(CONFIGS / "shapes.yaml").model_dump()
    config["student"]["model"], config["teacher"]["model"] = str(build.weights / "sd15"), str(build.weights / "flux")
    config["bridge"]["steps"] = build.steps(config["bridge"]["steps"])
    settings = validate(config)
    trainer = build_trainer(settings, pairs, torch.device("cpu"), 0, 1)
    for step in tqdm(range(settings.bridge.steps), desc="bridge", disable=None):
        parts = trainer.step(trainer.batch(step))
        if step % 100 == 0:
            tqdm.write(f"bridge {step}: {parts}")
    metrics, picture = trainer.validation()
    tqdm.write(f"bridge: {metrics}")
    picture.save(build.work / "bridge.png")
    trainer.bridge.save(build.weights / "bridge" / "sd15-flux", metrics, torch.float16)


STAGES: dict[str, tuple[str, Callable[[Build], None]]] = {
    "judge": ("judge/judge.safetensors", build_judge),
    "text": ("text/t5/encoder/model.safetensors", build_text),
    "teacher_vae": ("vae/teacher_vae/config.json", build_teacher_vae),
    "student_vae": ("vae/student_vae/config.json", build_student_vae),
    "flux": ("flux/.built", build_flux),
    "sd15": ("sd15/.built", build_sd15),
    "prompts": ("heldout.txt", build_prompts),
    "sd15_start": ("sd15-onestep/.built", build_sd15_start),
    "samples": ("samples/.built", build_samples),
    "bridge": ("bridge/sd15-flux/bridge.json", build_bridge),
}


def forget_paths(folder: Path) -> None:
    """Remove where a part was loaded from out of the configuration files: it says nothing to others."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def run_stages(build: Build, names: Iterable[str]) -> None:
    """Run the named stages in their order, skipping what is already built."""
    for name in names:
        marker, stage = STAGES[name]
        if (build.weights / marker).exists():
            tqdm.write(f"{name}: already built")
            continue
        stage(build)
        forget_paths(build.weights)
        (build.weights / marker).touch()
