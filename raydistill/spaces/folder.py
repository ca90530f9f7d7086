"""A diffusers pipeline folder: its configuration files, its networks and its text encoders. Knows no family."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn

from raydistill.errors import InputError
from raydistill.storage.staging import on_this_machine

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar of diffusers: every worker would show one for a part of a second."""
    shown = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers.utils.logging.enable_progress_bar()


class Settings(dict[str, Any]):
    """A JSON file of a model folder; asking for a key that it lacks names the file."""

    def __init__(self, values: dict[str, Any], file: str = "") -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.file}: lacks {key!r}")


def read_settings(file: Path) -> Settings:
    """A JSON object. Raises InputError, which names the file, where it is missing or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds no JSON object")
    return Settings(values, str(file))


def diffusers_class(config: Settings) -> type:
    """The class that a part's configuration names. Raises InputError where this diffusers has none such."""
    name = config["_class_name"]
    found = getattr(diffusers, str(name), None)
    if found is None:
        raise InputError(f"{config.file}: diffusers {diffusers.__version__} has no class {name!r}")
    return found


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of one network: `<stem>.safetensors`, or those that `<stem>.safetensors.index.json` names.

    Raises:
        InputError: there is neither, or a file that the index names is not there.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise InputError(f"{folder}: no {single.name} (or {index.name})")
        return [single]
    weight_map = read_settings(index)["weight_map"]
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    foreign = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if foreign or not names:
        raise InputError(f"{index}: names {', '.join(foreign) or 'nothing'}, which is not a file beside it")
    return [folder / name for name in names]


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

    @cached_property
    def index(self) -> Settings:
        """model_index.json."""
        return read_settings(Path(self.folder, "model_index.json"))

    def parts(self, prefix: str = "") -> dict[str, list[str]]:
        """Parts that model_index.json names and that are there: name -> [library, class]."""
        return {
            name: entry
            for name, entry in self.index.items()
            if name.startswith(prefix) and isinstance(entry, list) and entry[0] is not None
        }

    def part_config(self, name: str) -> Settings:
        """config.json (or scheduler_config.json) of one pipeline part."""
        for file in (Path(self.folder, name, "config.json"), Path(self.folder, name, "scheduler_config.json")):
            if file.is_file():
                return read_settings(file)
        raise InputError(f"{self.folder}: no {name}/config.json; is it a complete diffusers pipeline folder?")

    def load_part(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """One network of the folder, frozen and in evaluation mode. Safetensors only."""
        module_class = diffusers_class(self.part_config(name))
        try:
            module = module_class.from_pretrained(self.folder, subfolder=name, dtype=dtype, use_safetensors=True)
        except OSError as error:
            raise InputError(f"{self.folder}/{name}: {error}") from error
        return module.eval().requires_grad_(False)

    def load_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.load_part(self.network_name, dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The VAE in `dtype`; in float32 instead of float16 where its `force_upcast` says that it overflows there."""
        vae = self.load_part("vae")
        overflows = dtype == torch.float16 and vae.config.get("force_upcast")
        return vae if overflows else vae.to(dtype)

    def load_text(self, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
        """The pipeline without its network and VAE: tokenizers and text encoders only."""
        pipeline_class = diffusers_class(self.index)
        without = {self.network_name: None, "vae": None} | self.unused_parts
        self._check_text_parts(without)
        try:
            with without_bars():
                pipeline = pipeline_class.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **without)
        except OSError as error:
            raise InputError(f"{self.folder}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _check_text_parts(self, without: dict[str, None]) -> None:
        """Parts of model_index.json have files. transformers makes an empty tokenizer where there is no vocabulary."""
        for name in self.parts():
            if name in without:
                continue
            if not Path(self.folder, name).is_dir():
                raise InputError(f"{self.folder}: model_index.json names {name}, but there is no such folder")
            if name.startswith("tokenizer") and not any(
                Path(self.folder, name, file).is_file() for file in VOCABULARIES
            ):
                raise InputError(f"{self.folder}/{name}: no vocabulary ({', '.join(VOCABULARIES)})")

    def check_files(self, *, network: bool = True) -> None:
        """Every part that is used has its configuration and, if it is a network, its weights; loads nothing.

        Args:
            network: False where the diffusion network's weights come from elsewhere.

        Raises:
            InputError: a file is missing or damaged; it is named.
        """
        for part in (self.network_name, "vae", "scheduler"):
            diffusers_class(self.part_config(part))
        for part in ("vae", *([self.network_name] if network else [])):
            weight_files(Path(self.folder, part), "diffusion_pytorch_model")
        self._check_text_parts({self.network_name: None, "vae": None} | self.unused_parts)
        for name in self.parts("text_encoder"):
            self.part_config(name)
            weight_files(Path(self.folder, name), "model")

    def empty_text_encoder(self, part: str) -> nn.Module:
        """One of the text encoders, frozen, without weights on the meta device; for counting."""
        library, name = self.parts(part)[part]
        network_class = getattr(importlib.import_module(library), name)
        config = network_class.config_class(**self.part_config(part))
        with torch.device("meta"):
            return network_class(config).eval().requires_grad_(False)
