"""Where the weights of metrics are: as named, in the hub's cache, or fetched before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from raydistill.errors import InputError
from raydistill.evaluation.rewards import TOKENIZER_ONLY, WEIGHTS, Weights

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = ["tokenizer*", "vocab.txt", "config.json", "special_tokens_map.json"]


def parse_weights(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=PLACE` of --weights. Raises InputError for a name that no metric has."""
    names = [weights.option for needed in WEIGHTS.values() for weights in needed]
    found = {}
    for text in texts:
        name, sign, place = text.partition("=")
        if not sign or not place or name not in names:
            raise InputError(f"--weights {text}: write NAME=PLACE; names: {', '.join(names)}")
        found[name] = place
    return found


def find_weights(metric: str, named: Mapping[str, str]) -> dict[str, str]:
    """option -> absolute file or folder of everything that a metric loads.

    Raises:
        InputError: something is neither here nor to be had; says what, how large, and how to get it.
    """
    return {weights.option: _find(metric, weights, named.get(weights.option)) for weights in WEIGHTS.get(metric, ())}


def _find(metric: str, weights: Weights, place: str | None) -> str:
    if place is not None:
        path = Path(place).expanduser()
        if path.exists():
            if path.is_dir() and weights.file is not None and (path / weights.file).is_file():
                path = path / weights.file
            if path.is_dir() == (weights.file is None):
                return str(path.resolve())
            kind = "a file" if weights.file else "a folder"
            raise InputError(f"--weights {weights.option}={place}: must be {kind}")
        if not weights.repo or place.count("/") != 1 or place.startswith((".", "/", "~")):
            raise InputError(f"--weights {weights.option}={place}: no such file or folder")
    if not weights.repo:
        path = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints" / weights.file
        if path.is_file():
            return str(path)
        raise InputError(
            f"metric {metric}: its weights ({weights.size}) are not at {path}. Get them from {weights.url}, and put them "
            f"there on every node, or name the file: --weights {weights.option}=FILE"
        )
    return _of_hub(metric, weights, place or weights.repo)


def _of_hub(metric: str, weights: Weights, repo: str) -> str:
    """From the cache, else fetched."""
    patterns = TOKENIZER_FILES if weights.option in TOKENIZER_ONLY else MODEL_FILES
    try:
        if weights.file is not None:
            return str(Path(hf_hub_download(repo, weights.file)).absolute())
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
        if (folder / "config.json").is_file():
            return str(folder.absolute())
        problem = "the copy in the cache is not complete"
    except LocalEntryNotFoundError:
        problem = f"not in the hub cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached"
    except HfHubHTTPError as error:
        problem = f"{constants.ENDPOINT} answers with status {error.response.status_code}"
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
    what = f"{weights.file} of {repo}" if weights.file else repo
    fetch = f"hf download {repo}" + (f" {weights.file}" if weights.file else "")
    raise InputError(
        f"metric {metric}: its weights {what} ({weights.size}): {problem}. Where there is a network: `{fetch}`, with HF_HOME "
        f"on a file system that all nodes see; or name a copy: --weights {weights.option}="
        + ("FILE" if weights.file else "FOLDER")
    )
