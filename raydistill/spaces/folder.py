"""A diffusers pipeline folder: its configuration files, its networks and its text encoders. Knows no family.

All of the package opens model folders here. No code of a folder ever runs, and whatever is wrong with one ends as one line.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import diffusers
import torch
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.settings import (
    Settings,
    built,
    check_extent,
    diffusers_class,
    read_settings,
    reading,
    through_class,
)
from raydistill.storage.staging import on_this_machine

if TYPE_CHECKING:
    import transformers

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
NETWORK_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"  # names of weight files, without their endings
VARIANT = "fp16"  # of weights; taken where there is nothing else, as storage/hub.py fetches them


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars, which every worker would show for a part of a second, and no list of what was loaded."""
    libraries = [diffusers.utils.logging]
    if "transformers" in sys.modules:  # teacher ranks run a network alone, and never import it
        libraries.append(sys.modules["transformers"].utils.logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, (shown, level) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


def cast(network: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None = None) -> nn.Module:
    """`network.to(device, dtype)`. That of diffusers warns whenever it is given a dtype, of no modules even."""
    return nn.Module.to(network, device=device, dtype=dtype)


# -- weight files -------------------------------------------------------------------------------------------


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of one network: `<stem>.safetensors`, or those that `<stem>.safetensors.index.json` names.

    Where there is neither, those of the fp16 variant, which have fp16 in their names.

    Raises:
        InputError: there is none, or a file that the index names is not there.
    """
    return _weight_files(folder, stem).files


def weight_index(folder: Path, stem: str) -> Path | None:
    """The index that names `weight_files`; None where one file holds all. Raises as `weight_files`."""
    return _weight_files(folder, stem).index


def variant(folder: Path, stem: str) -> str | None:
    """`fp16` where `weight_files` are of this variant; else None. Raises as `weight_files`."""
    return _weight_files(folder, stem).variant


def plain_name(file: Path) -> str:
    """The name of a weight file, or of an index of some, without the mark of the fp16 variant."""
    return re.sub(rf"\.{VARIANT}(?=[.-])", "", file.name)


class _Weights(NamedTuple):
    files: list[Path]
    variant: str | None
    index: Path | None


def _weight_files(folder: Path, stem: str) -> _Weights:
    names = {None: (f"{stem}.safetensors", f"{stem}.safetensors.index.json")}
    names[VARIANT] = (f"{stem}.{VARIANT}.safetensors", f"{stem}.safetensors.index.{VARIANT}.json")
    for kind, (single, index) in names.items():
        if (folder / index).is_file():
            return _Weights(_indexed(folder / index), kind, folder / index)
        if (folder / single).is_file():
            return _Weights([folder / single], kind, None)
    single, index = names[None]
    raise InputError(f"{folder}: no {single} (or {index})")


def _indexed(index: Path) -> list[Path]:
    """The files beside `index` that it names."""
    settings = read_settings(index)
    if not isinstance(settings["weight_map"], dict) or not settings["weight_map"]:
        raise settings.wrong("weight_map", "an object of tensors and their files")
    names = sorted({str(name) for name in settings["weight_map"].values()})
    beside = {file.name for file in index.parent.iterdir() if file.is_file()}
    foreign = [name for name in names if name not in beside]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(f"{index}: names {', '.join(foreign[:3])}{more}, which is not a file beside it")
    return [index.parent / name for name in names]


# -- the folder ---------------------------------------------------------------------------------------------


class ModelFolder:
    """One pipeline folder, whose parts are read when they are asked for."""

    pipeline_class: ClassVar[str]  # the diffusers class named by model_index.json
    network_name: ClassVar[str]  # "unet" or "transformer"
    unused_parts: ClassVar[dict[str, None]] = {}  # parts of model_index.json that are never loaded

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On another node, which may not have staged the folder yet."""
        self.__dict__ |= state | {"folder": str(on_this_machine(state["folder"]))}

    # -- configuration files -----------------------------------------------------------------------
    @cached_property
    def index(self) -> Settings:
        """model_index.json, with the pipeline's own values where it has none."""
        return through_class(read_settings(Path(self.folder, "model_index.json")), diffusers.DiffusionPipeline)

    def parts(self, prefix: str = "") -> dict[str, tuple[str, str]]:
        """Parts that model_index.json names and that are there: name -> (library, class).

        Raises:
            InputError: an entry is no such pair.
        """
        found = {}
        for name, entry in self.index.items():
            if not isinstance(entry, list) or not name.startswith(prefix) or entry == [None, None]:
                continue
            if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
                raise self.index.wrong(name, "a library and a class")
            found[name] = tuple(entry)
        return found

    def part_config(self, name: str) -> Settings:
        """config.json (or scheduler_config.json) of one pipeline part.

        Of a network or scheduler of diffusers it has the class's own values where the file has none.
        """
        for file in (Path(self.folder, name, "config.json"), Path(self.folder, name, "scheduler_config.json")):
            if file.is_file():
                config = read_settings(file)
                if name.startswith("text_encoder"):
                    check_extent(config, math.inf)  # bases of rotary embeddings may be large
                    return config
                return through_class(config, diffusers.SchedulerMixin if name == "scheduler" else diffusers.ModelMixin)
        raise InputError(f"{self.folder}: no {name}/config.json; is it a complete diffusers pipeline folder?")

    def tokenizer_config(self, name: str) -> Settings:
        """tokenizer_config.json of one tokenizer; empty where it has none, as transformers takes it."""
        file = Path(self.folder, name, "tokenizer_config.json")
        return read_settings(file) if file.is_file() else Settings({}, str(file))

    def longest_text(self, tokenizer: str) -> float:
        """Tokens that a tokenizer and its text encoder's table of positions allow; infinite where neither says.

        Raises:
            InputError: `model_max_length` or `max_position_embeddings` is no number of tokens.
        """
        config, encoder = self.tokenizer_config(tokenizer), self.part_config(encoder_of(tokenizer))
        limits = []
        for settings, key in ((config, "model_max_length"), (encoder, "max_position_embeddings")):
            if settings.get(key) is not None:
                limits.append(settings.whole(key, most=10**40))  # transformers writes 10^30 for "no limit"
        return min((limit for limit in limits if limit < 10**9), default=math.inf)

    # -- networks ----------------------------------------------------------------------------------
    def load_part(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> nn.Module:
        """One network of the folder, frozen and in evaluation mode. Safetensors only.

        Args:
            device: weights go there one by one, without a copy of all on the CPU; None: the CPU.

        Raises:
            InputError: the part is missing or damaged, or weights are not in its files.
        """
        module_class, folder = diffusers_class(self.part_config(name)), Path(self.folder, name)
        kind = variant(folder, NETWORK_WEIGHTS)
        where = {} if device is None or device.type == "cpu" else {"device_map": {"": device}}
        with reading(folder), without_bars():
            module, loading_info = module_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, variant=kind, output_loading_info=True, **where
            )
        check_loaded(folder, loading_info)
        return module.eval().requires_grad_(False)

    def load_network(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> nn.Module:
        """As `load_part`."""
        where = {} if device is None else {"device": device}
        return self.load_part(self.network_name, dtype, **where)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The VAE in `dtype`; in float32 instead of float16 where its `force_upcast` says that it overflows there.

        diffusers' class says so of every VAE whose configuration says nothing, such as that of SD 1.5.
        """
        overflows = dtype == torch.float16 and self.part_config("vae").get("force_upcast")
        return self.load_part("vae", torch.float32 if overflows else dtype)

    # -- text --------------------------------------------------------------------------------------
    def load_text(self, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
        """The pipeline without its network and VAE: tokenizers and text encoders only.

        Raises:
            InputError: a part is missing or damaged, or weights of a text encoder are not in its files.
        """
        self.check_text_parts()
        return self.text_pipeline({part: self._load_text_encoder(part, dtype) for part in self.parts("text_encoder")})

    def text_pipeline(self, encoders: Mapping[str, nn.Module]) -> diffusers.DiffusionPipeline:
        """`load_text` with these text encoders, by part."""
        pipeline_class, parts = diffusers_class(self.index), self.parts()
        without = {self.network_name, "vae", *self.unused_parts}
        given: dict[str, Any] = {}
        with reading(self.folder), without_bars():
            for name, parameter in inspect.signature(pipeline_class).parameters.items():
                entry = self.index.get(name)
                if name in encoders:
                    given[name] = encoders[name]
                elif name in parts and name not in without:
                    found = getattr(_library(parts[name][0]), parts[name][1])
                    given[name] = found.from_pretrained(Path(self.folder, name))
                elif parameter.default is parameter.empty or not isinstance(entry, list):
                    given[name] = None if isinstance(entry, list) else entry
            pipeline = pipeline_class(**given)
        pipeline.set_progress_bar_config(disable=True)
        for part in self.parts("tokenizer"):
            if encoder_of(part) in encoders:
                self._limit(pipeline, part)
        return pipeline

    def _limit(self, pipeline: diffusers.DiffusionPipeline, part: str) -> None:
        """A tokenizer cuts what its text encoder has no positions for; its own file may name no length."""
        tokenizer, longest = getattr(pipeline, part), self.longest_text(part)
        if tokenizer.model_max_length > longest:
            tokenizer.model_max_length = longest
        if part == "tokenizer" and hasattr(pipeline, "tokenizer_max_length"):  # read when the pipeline was made
            pipeline.tokenizer_max_length = min(pipeline.tokenizer_max_length, tokenizer.model_max_length)

    def _load_text_encoder(self, part: str, dtype: torch.dtype) -> nn.Module:
        folder = Path(self.folder, part)
        network_class, kind = self.text_class(part), variant(folder, TEXT_WEIGHTS)
        with reading(folder), without_bars():
            encoder, loading_info = network_class.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                variant=kind,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
            )
        check_loaded(folder, loading_info)
        return encoder.eval()

    def text_class(self, part: str) -> type[transformers.PreTrainedModel]:
        """The class of a text encoder. Raises InputError where transformers and diffusers have none such."""
        import transformers  # teacher ranks, which run a network alone, do without

        library, name = self.parts(part)[part]
        found = getattr(_library(library), name, None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise self.index.wrong(part, "a text encoder of transformers or diffusers")
        return found

    def empty_text_encoder(self, part: str) -> nn.Module:
        """One of the text encoders, frozen, without weights on the meta device; for counting."""
        network_class, config = self.text_class(part), self.part_config(part)

        def make() -> nn.Module:
            with torch.device("meta"):
                return network_class(network_class.config_class(**config))

        return built(config, network_class.config_class, make).eval().requires_grad_(False)

    def check_text_parts(self) -> None:
        """Parts of model_index.json have files. transformers makes an empty tokenizer where there is no vocabulary.

        Raises:
            InputError: a part without files, or of a library that is neither transformers nor diffusers.
        """
        without = {self.network_name: None, "vae": None} | self.unused_parts
        for name, (library, kind) in self.parts().items():
            if name in without:
                continue
            if _library(library) is None or kind.startswith("Auto"):  # those ask a file which class it means
                raise self.index.wrong(name, "a class of transformers or diffusers; no other code is run")
            if not Path(self.folder, name).is_dir():
                raise InputError(f"{self.folder}: model_index.json names {name}, but there is no such folder")
            if name.startswith("tokenizer") and not any(
                Path(self.folder, name, file).is_file() for file in VOCABULARIES
            ):
                raise InputError(f"{self.folder}/{name}: no vocabulary ({', '.join(VOCABULARIES)})")


def encoder_of(tokenizer: str) -> str:
    """The name of the text encoder that reads a tokenizer's tokens."""
    return tokenizer.replace("tokenizer", "text_encoder")


def _library(name: str) -> types.ModuleType | None:
    """transformers, diffusers, or a module of diffusers' pipelines, such as `kolors`; None: another."""
    if name in ("transformers", "diffusers"):
        return importlib.import_module(name)
    found = getattr(diffusers.pipelines, name, None)
    return found if isinstance(found, types.ModuleType) and not name.startswith("_") else None


def check_loaded(folder: Path, loading_info: Mapping[str, Any]) -> None:
    """See that a network's files held all its weights.

    transformers fills up what is missing with random numbers, and diffusers leaves it on the meta device.

    Args:
        loading_info: what `from_pretrained(output_loading_info=True)` says.

    Raises:
        InputError: weights are missing, or have other shapes.
    """
    wrong = [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
    wrong += [
        f"{name} has shape {tuple(found)}, not {tuple(shape)}" for name, found, shape in loading_info["mismatched_keys"]
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{folder}: weights do not fit config.json: {wrong[0]}{more}")
