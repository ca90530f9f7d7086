"""One-step students as they are published: recognised, and checked by names and shapes before weights are read.

What `student.unet` may name
    folder              a diffusers network; a pipeline or checkpoint folder with one (`unet_ema/` goes before `unet/`,
                        `transformer_ema/` before `transformer/`); DMD2's checkpoint folder (`pytorch_model.bin`)
    file                a network's state dict: .safetensors, or torch.save's .bin .pt .pth without code

A state dict may be wrapped, in nested dictionaries or dotted prefixes, by names in WRAPPINGS and EMA_NAMES
(`state_dict.module.unet.conv_in.weight`). Of several networks the EMA is taken, which is what authors evaluate and
publish; without a single EMA the choice would be a guess, and is refused.

DMD2 (github.com/tianweiy/DMD2) publishes its SD 1.5 students as `pytorch_model.bin`, a plain state dict; t = 999.
SiD-LSG (github.com/mingyuanzhou/SiD-LSG) starts at t = 625 from noise · sigma_625, and publishes
`…_t625_….pkl`: a pickled network, which runs code when it is read, so it must be converted to a state dict first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.folder import weight_files
from raydistill.spaces.settings import Settings, built, diffusers_class, read_settings, through_class
from raydistill.spaces.weights import DTYPES, SUFFIXES, Entry, Header, read_header, read_tensors

EMA_NAMES = frozenset({
    "ema", "G_ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "unet_ema", "ema_unet",
    "transformer_ema", "ema_transformer", "generator_ema", "student_ema",
})  # fmt: skip
WRAPPINGS = frozenset({
    "state_dict", "model_state_dict", "model", "module", "_orig_mod", "net", "network", "unet", "transformer",
    "generator", "G", "student", "feedforward_model",
})  # fmt: skip
# What a training checkpoint or a pipeline holds besides; left unread.
COMPANIONS = frozenset({
    "optimizer", "optimizers", "lr_scheduler", "scheduler", "scaler", "n_averaged", "vae", "text_encoder", "fake",
    "discriminator",
})  # fmt: skip
_NAMES = {"flow_prediction": "velocity"}  # of predictions: schedulers' -> this package's
START_NAMES = ("start_timestep", "init_timestep", "init_timesteps")
# In a folder, by precedence.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# Settings that leave the network's function alone: size of its usual input, precision, training.
FREE_SETTINGS = ("sample_size", "upcast_attention", "dropout")


@dataclass(frozen=True)
class StudentCheckpoint:
    """A recognised student: its weights fit, and none of them has been read."""

    files: tuple[Path, ...]
    prefix: str  # of the tensors that are taken
    others: tuple[str, ...]  # prefixes of further networks in the same file, not taken
    start_timestep: int | None  # what the checkpoint says of itself
    start_source: str  # where it says so

    @property
    def source(self) -> Path:
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def describe(self) -> str:
        """Which weights are taken, in one line."""
        tensors = f", tensors {self.prefix}*" if self.prefix else ""
        others = f" (not {', '.join(prefix + '*' for prefix in self.others)})" if self.others else ""
        return f"student starts from {self.source}{tensors}{others}"

    def start_conflict(self, start_timestep: int) -> str | None:
        """One line where the checkpoint names another start than the configuration, which decides; else None."""
        if self.start_timestep in (None, start_timestep):
            return None
        return (
            f"warning: {self.source} starts at timestep {self.start_timestep} according to {self.start_source}, but "
            f"student.start_timestep={start_timestep} decides and is used; unless that is meant, set "
            f"student.start_timestep={self.start_timestep}"
        )

    def takes(self, name: str) -> bool:
        """Whether a tensor of the files belongs to the network that is taken."""
        return _owner(name, (self.prefix, *self.others)) == self.prefix and not _companion(name)


def open_student(space: Space, path: Path) -> StudentCheckpoint:
    """Check a checkpoint against the network of the student's own folder: settings, names, shapes and dtypes.

    Args:
        space: the student's Space; its network's `config.json` says which tensors a student has.
        path: file or folder, see the top of this file.

    Raises:
        InputError: no such format, a pickle that asks for code, another architecture or prediction type, a LoRA,
            missing, unexpected or misshapen tensors (the first is named), or several networks to choose from.
    """
    # the EMA goes before the raw network
    part = space.network_name
    place = next((path / name for name in (f"{part}_ema", part) if (path / name).is_dir()), path)
    _check_settings(space, place / "config.json")
    files = _weight_files(space, place)
    header = _merged(files)
    expected = {name: tuple(tensor.shape) for name, tensor in _on_meta(space.part_config(part)).state_dict().items()}
    prefix, others = _choose(space, header.tensors, next(iter(expected)), files[0])
    checkpoint = StudentCheckpoint(files, prefix, others, *_start(space, path, header.numbers))
    _check_tensors(space, checkpoint, expected, header.tensors)
    return checkpoint


def load_student(space: Space, path: Path) -> nn.Module:
    """The network of the student's own folder with a checkpoint's weights: float32, on the CPU, frozen, evaluating.

    Raises:
        InputError: as `open_student`; or a weight is not finite.
    """
    checkpoint = open_student(space, path)
    weights: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        for name, tensor in read_tensors(file, checkpoint.takes):
            if not tensor.isfinite().all():
                raise InputError(f"{file}: {name} holds NaN or infinity")
            weights[name.removeprefix(checkpoint.prefix)] = tensor
    config = space.part_config(space.network_name)
    network = _on_meta(config)
    network.load_state_dict(weights, assign=True)
    _fill_buffers(network, config)
    return network.eval().requires_grad_(False)


def _on_meta(config: Settings) -> nn.Module:
    """The network without memory for its weights. Raises InputError where the configuration describes none."""
    network_class = diffusers_class(config)

    def make() -> nn.Module:
        with torch.device("meta"):
            return network_class.from_config(config)

    return built(config, network_class, make)


def _fill_buffers(network: nn.Module, config: Settings) -> None:
    """Buffers that no file holds, such as a transformer's table of positions, as the network's class computes them."""
    hollow = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if not hollow:
        return
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        computed = dict(diffusers_class(config).from_config(config).named_buffers())
    for name in hollow:
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, computed[name])


# -- folders ----------------------------------------------------------------------------------------------


def _weight_files(space: Space, path: Path) -> tuple[Path, ...]:
    """The file or files that hold the weights."""
    if not path.is_dir():
        return (_weight_file(path),)
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        files = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        raise InputError(f"{path}: no weights of a {_kind(space)} ({', '.join(WEIGHT_FILES)}); it holds {files}")
    if found.suffix != ".json":
        return (found,)
    return tuple(weight_files(path, "diffusion_pytorch_model"))


def _weight_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix == ".pkl":
        raise InputError(
            f"{path}: a pickle runs code when it is read, so it is never opened. SiD-LSG publishes its students so; "
            "where you trust the file, convert it once, with its authors' code at hand: "
            f"torch.save({{'ema': pickle.load(open('{path.name}', 'rb'))['ema'].state_dict()}}, '{path.stem}.pt')"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: student.unet names a folder, or a file that ends in {', '.join(SUFFIXES)}")
    return path


def _merged(files: Iterable[Path]) -> Header:
    """The headers of all files of one checkpoint."""
    tensors: dict[str, Entry] = {}
    numbers: dict[str, int] = {}
    for file in files:
        header = read_header(file)
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(f"{file}: {twice} is also in another file of this checkpoint")
        tensors |= header.tensors
        numbers |= header.numbers
    return Header(tensors, numbers)


def _check_settings(space: Space, file: Path) -> None:
    """A network's config.json must mean the same function: some settings, as the number of heads, change no shape."""
    if not file.is_file():
        return
    config = read_settings(file)
    own = space.part_config(space.network_name)
    name, wanted = config.get("_class_name"), diffusers_class(own)
    if not (isinstance(name, str) and hasattr(diffusers, name)) or diffusers_class(config) is not wanted:
        raise InputError(f"{file}: is a {name}, but a {wanted.__name__} is needed")
    found = _on_meta(through_class(config)).config
    for key, value in _on_meta(own).config.items():
        if key in FREE_SETTINGS or key.startswith("_") or _plain(value) == _plain(found[key]):
            continue
        raise InputError(
            f"{file}: not a student of {space.folder}: {key} is {found[key]!r}, but its {_kind(space)} has {value!r}"
        )


def _plain(value: Any) -> Any:
    """One value for all blocks may be written once or as a list."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if value and all(item == value[0] for item in value) else tuple(value)


# -- tensors ----------------------------------------------------------------------------------------------


def _owner(name: str, prefixes: Iterable[str]) -> str | None:
    """The longest of the prefixes that the name has."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)


def _companion(name: str) -> bool:
    return name.split(".", 1)[0] in COMPANIONS


def _kind(space: Space) -> str:
    """UNet or transformer, for people."""
    return space.student_noun.split()[-1]


def _choose(space: Space, tensors: dict[str, Entry], anchor: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """(prefix of the network that is taken, prefixes of the others). A network is found by its first tensor."""
    prefixes = {}  # prefix -> its words
    for name in tensors:
        if name == anchor or name.endswith("." + anchor):
            prefix = name.removesuffix(anchor)
            words = set(prefix.removesuffix(".").split(".")) if prefix else set()
            if words <= EMA_NAMES | WRAPPINGS:
                prefixes[prefix] = words
    averaged = [prefix for prefix, words in prefixes.items() if words & EMA_NAMES]
    chosen = averaged if len(averaged) == 1 else list(prefixes)
    if len(chosen) == 1:
        return chosen[0], tuple(prefix for prefix in prefixes if prefix != chosen[0])
    if prefixes:
        raise InputError(
            f"{file}: holds several networks ({', '.join(prefix + anchor for prefix in prefixes)}) and not exactly "
            "one EMA; save the one that is meant alone"
        )
    missing = (
        f"no {_kind(space)}: {anchor} is missing, alone and behind {', '.join(sorted(EMA_NAMES | WRAPPINGS))}; "
        f"the first tensor is {next(iter(tensors), 'missing too')}"
    )
    raise InputError(f"{file}: {_lora(tensors) or missing}")


def _lora(names: Iterable[str]) -> str | None:
    first = next((name for name in names if "lora" in name.lower()), None)
    return f"holds a LoRA (the first tensor of it is {first}); name it in student.lora_start" if first else None


def _check_tensors(
    space: Space, checkpoint: StudentCheckpoint, expected: dict[str, tuple[int, ...]], tensors: dict[str, Entry]
) -> None:
    """Exactly the expected names and shapes, as floats. The first difference, in the network's order, is named."""
    prefix, prefixes = checkpoint.prefix, (checkpoint.prefix, *checkpoint.others)
    found = {name.removeprefix(prefix): entry for name, entry in tensors.items() if checkpoint.takes(name)}
    stray = [name for name in tensors if _owner(name, prefixes) is None and not _companion(name)]
    unexpected = [prefix + name for name in found if name not in expected] + stray
    problems = {}
    for name, shape in expected.items():
        if name not in found:
            problems[name] = "is missing"
        elif found[name].shape != shape:
            problems[name] = f"has the shape {list(found[name].shape)}, not {list(shape)}"
        elif found[name].dtype not in DTYPES.values():
            problems[name] = f"is {found[name].dtype}, but {', '.join(DTYPES.values())} are read"
    if not problems and not unexpected:
        return
    texts = [f"{prefix}{name} {problem}" for name, problem in problems.items()]
    texts += [f"{name} is not a tensor of it" for name in unexpected]
    more = f" (and {len(texts) - 1} more differences)" if len(texts) > 1 else ""
    text = _lora(unexpected) or texts[0] + more
    raise InputError(f"{checkpoint.source}: not a student of {space.folder}: {text}")


# -- where it starts --------------------------------------------------------------------------------------


def _start(space: Space, path: Path, numbers: dict[str, int]) -> tuple[int | None, str]:
    """(start timestep that the checkpoint states, where), or (None, "").

    It is stated by a number of such a name in the file; by the scheduler of a pipeline folder (`Space.start_of`); or by `_t625_` in its name, as in SiD-LSG's.

    Raises:
        InputError: the pipeline's scheduler names another prediction type.
    """
    scheduler = path / "scheduler" / "scheduler_config.json"
    config = through_class(read_settings(scheduler)) if scheduler.is_file() else Settings({})
    prediction = config.get("prediction_type", space.prediction)
    prediction = _NAMES.get(prediction, prediction)
    if prediction != space.prediction:
        raise InputError(
            f"{scheduler}: its {_kind(space)} predicts {prediction!r}, but {space.folder} is read as {space.prediction!r}"
        )
    stated = [(value, name) for name, value in numbers.items() if name.rsplit(".", 1)[-1] in START_NAMES]
    start = space.start_of(config) if config else None
    stated += [] if start is None else [(start, "its scheduler")]
    in_name = re.search(r"(?<![A-Za-z0-9])t(\d{3,4})(?![A-Za-z0-9])", path.name)
    if in_name:
        stated.append((int(in_name[1]), "its name"))
    last = space.path.num_train_timesteps - 1
    return next(((value, where) for value, where in stated if 0 < value <= last), (None, ""))
