"""What a path of the configuration means on this machine: a path, `shapes:NAME`, a URI, or a model of the hub."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from raydistill.config.reading import get
from raydistill.config.schema import Config
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.storage.globs import expand, is_pattern
from raydistill.storage.hub import download, fetch_file, is_hub_file, is_hub_id, on_this_node
from raydistill.storage.place import Place, Remote, is_uri, remote
from raydistill.storage.staging import fetch, on_this_machine

SHAPES_PREFIX = "shapes:"
PATTERN_KEYS = ("prompts.path", "evaluation.prompts")  # may name several files
FILE_KEYS = ("student.lora_start",)  # may name a file of the hub
HUB_KEYS = ("student.model", "teacher.model", "synthesis.teacher")  # may name a model of the Hugging Face hub
SET_KEYS = (  # may name files of a data set of the hub
    *HUB_KEYS, "student.unet", *FILE_KEYS, "prompts.path", "evaluation.prompts", "synthesis.images", "bridge.pairs",
    "bridge.checkpoint", "discriminator.real_data", "evaluation.judge",
)  # fmt: skip


# -- outputs ----------------------------------------------------------------------------------------------


def to_place(text: str) -> Place:
    """Where outputs go, or what is read where it lies: a local path, or a URI's place. Raises InputError as `remote`."""
    return remote(text) if is_uri(text) and not text.startswith("file://") else local_path(text)


def place_argument(text: str) -> Place:
    """`to_place` of a folder, for argparse."""
    try:
        place = to_place(text)
        if isinstance(place, Path):
            _possible_folder(place)
        return place
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """A path of this machine, or file://, for argparse."""
    found = place_argument(text)
    if isinstance(found, Remote):
        raise argparse.ArgumentTypeError(f"{found}: must be a folder of this machine, or of a file system that it sees")
    return found


def require_folder(storage: Place, what: str) -> None:
    """Raises InputError where `storage` is a bucket, which `what` cannot use."""
    if isinstance(storage, Remote):
        raise InputError(f"storage: {storage}: {what} needs a folder that every node sees, and goes by no URI")


# -- inputs -----------------------------------------------------------------------------------------------


def local_path(path: str) -> Path:
    """A path of the configuration on this machine.

    `shapes:NAME` is a part of the embedded world. What `s3://` and `gs://` name is fetched once a node (`staging.fetch`).

    Raises:
        InputError: a URI of another scheme, of nothing, or that may not be read; or `~` of nobody.
        OSError: the store of a URI does not answer.
    """
    if path.startswith(SHAPES_PREFIX):
        return WEIGHTS / path.removeprefix(SHAPES_PREFIX)
    if path.startswith("file:///"):
        return Path(unquote(path.removeprefix("file://")))
    if is_uri(path):
        return fetch(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who has no home here
        raise InputError(f"{path}: {error}") from None


def resolve(path: str) -> Path:
    """`local_path`, or the cached folder of a hub model `org/name[@revision]`.

    `check_paths` downloads hub models when a run starts. A node with a cache of its own does so here.

    Raises:
        InputError: as `local_path`, or a hub model cannot be fetched.
    """
    found = local_path(path)
    if found.exists():
        return found
    return on_this_node(path) if is_hub_id(path) else on_this_machine(found)


def resolve_file(path: str) -> Path:
    """`local_path`, or the cached file that org/name[@revision][/file.safetensors] of the hub names. Raises as `resolve`."""
    found = local_path(path)
    return fetch_file(path) if not found.exists() and is_hub_file(path) else on_this_machine(found)


def input_place(path: str) -> Place:
    """An input that is read part by part: a bucket's place as it is, of which nothing is staged, or `resolve`."""
    return to_place(path) if is_uri(path) else resolve(path)


def check_paths(config: Config, keys: Sequence[str]) -> None:
    """Every named path must exist; models of the hub and URIs are fetched.

    Raises InputError: one line for each that cannot be used, with key and path. Hub models are fetched when all else is there.
    """
    wrong: list[str] = []
    for keys_now in (
        [key for key in keys if not _of_hub(config, key)],
        [key for key in keys if _of_hub(config, key)],
    ):
        for key in keys_now:
            try:
                _check_path(key, get(config, key))
            except (InputError, OSError) as error:
                wrong.append(f"{key}: {error}")
        if wrong:
            raise InputError("\n".join(wrong))


def _of_hub(config: Config, key: str) -> bool:
    value = get(config, key)
    if value is None or not ((key in HUB_KEYS and is_hub_id(value)) or (key in FILE_KEYS and is_hub_file(value))):
        return False
    return not local_path(value).exists()


def _check_path(key: str, value: str | None) -> None:
    if value is None:
        return
    if key in PATTERN_KEYS and is_pattern(value):
        expand(value)
        return
    if (found := local_path(value)).exists():
        return
    if key in FILE_KEYS and is_hub_file(value):
        fetch_file(value)
        return
    if key not in HUB_KEYS or not is_hub_id(value):
        raise InputError(f"{value} does not exist (looked at {found})")
    download(value)


def check_storage(config: Config) -> Place:
    """Absolute storage root, or a URI's.

    Raises:
        InputError: a wrong URI, what can be no folder, or a relative one under `ray job submit`.
    """
    relative = not is_uri(config.storage) and not Path(config.storage).is_absolute() and config.storage[0] != "~"
    if relative and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise InputError(
            f"storage: {config.storage!r} is relative, and under `ray job submit` the working directory is a copy that is "
            "thrown away; name an absolute folder, for example storage=$HOME/raydistill"
        )
    try:
        place = to_place(config.storage)
        if isinstance(place, Remote) and place.scheme == "hf":
            raise InputError(f"{place}: a data set of the hub is read alone; name a folder, s3:// or gs://")
        return place if isinstance(place, Remote) else _possible_folder(place)
    except InputError as error:
        raise InputError(f"storage: {error}") from None


def _possible_folder(folder: Path) -> Path:
    """An absolute path at which there is a folder, or one can be made. Raises InputError."""
    try:
        found = folder.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
        around = next(path for path in (found, *found.parents) if os.path.lexists(path))
        reason = None if around.is_dir() else "a loop of links" if around.is_symlink() else "a file"
    except (OSError, RuntimeError, ValueError) as error:  # Python before 3.13 has RuntimeError for a loop of links
        raise InputError(f"{str(folder)!r} cannot be a folder ({error}); name another one") from None
    if reason is not None:
        raise InputError(f"{around} is {reason}, not a folder; name another one")
    return found
