"""Where the weights of metrics are: as named, in the hub's cache, or fetched before anything starts.

huggingface_hub is imported inside a function: it is slow to import, and most runs have no use for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from raydistill.errors import InputError
from raydistill.evaluation.rewards import TOKENIZER_ONLY, WEIGHTS, Weights
from raydistill.storage.hub import is_hub_id

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = ["tokenizer*", "vocab.*", "merges.txt", "config.json", "special_tokens_map.json"]
TOKENIZER_FILES += ["preprocessor_config.json"]
OPTION = "--weights "  # how a place is named on the command line, before NAME=PLACE


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


def find_weights(metric: str, named: Mapping[str, str], option: str = OPTION) -> dict[str, str]:
    """option -> absolute file or folder of everything that a metric loads.

    Args:
        named: option -> file, folder or `org/name[@revision]` of the hub.
        option: how people name places, for messages.

    Raises:
        InputError: something is neither here nor to be had; says what, how large, and how to get it.
    """
    needed = WEIGHTS.get(metric, ())
    return {weights.option: _find(metric, weights, named.get(weights.option), option) for weights in needed}


def _find(metric: str, weights: Weights, place: str | None, option: str) -> str:
    if place is not None:
        path = Path(place).expanduser()
        if path.exists():
            if path.is_dir() and weights.file is not None and (path / weights.file).is_file():
                path = path / weights.file
            if path.is_dir() == (weights.file is None):
                return str(path.resolve())
            kind = "a file" if weights.file else "a folder"
            raise InputError(f"{option}{weights.option}={place}: must be {kind}")
        if not weights.repo or not is_hub_id(place):
            raise InputError(f"{option}{weights.option}={place}: no such file or folder")
    if not weights.repo:
        path = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints" / weights.file
        if path.is_file():
            return str(path)
        raise InputError(
            f"metric {metric}: its weights ({weights.size}) are not at {path}. Get them from {weights.url}, and put them "
            f"there on every node, or name the file: {option}{weights.option}=FILE"
        )
    return _of_hub(metric, weights, place or weights.repo, option)


def _of_hub(metric: str, weights: Weights, place: str, option: str) -> str:
    """From the cache, else fetched."""
    # slow to import
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, named = place.partition("@")
    revision = named or None
    patterns = TOKENIZER_FILES if weights.option in TOKENIZER_ONLY else MODEL_FILES
    try:
        if weights.file is not None:
            return str(Path(hf_hub_download(repo, weights.file, revision=revision)).absolute())
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
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
        f"on a file system that all nodes see; or name a copy: {option}{weights.option}="
        + ("FILE" if weights.file else "FOLDER")
    )
