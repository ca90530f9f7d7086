"""Checkpoint folders: one torch file of tensors and plain values, and a small JSON for people.

The torch file holds everything and is replaced in one step, so a kill leaves the old one or the new one. It is read with
`weights_only=True`, so that a checkpoint can never run code, and its checksums are compared, which torch does not do.
"""

from __future__ import annotations

import errno
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from raydistill.storage.atomic import reading, replace_text, replacing
from raydistill.storage.place import Place, Remote

MARGIN = 64 << 20  # bytes of a disk that a checkpoint leaves free
# What a missing file, and a seek to where a damaged directory points, raise; any other is of the disk or the network
DAMAGE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or does not belong here."""


def save_state(folder: Path, state: dict[str, Any], about: dict[str, Any]) -> None:
    """Write `state.pt` and `about.json` into an existing folder; an older state stays until the new one is whole."""
    try:
        with replacing(folder / "state.pt", alone=True, durable=False) as fresh:
            torch.save({"state": state, "about": about}, fresh)
    except (OSError, RuntimeError) as error:  # of a full disk torch says "unexpected pos", if it says anything
        free = shutil.disk_usage(folder).free / 2**30
        raise OSError(
            f"{folder / 'state.pt'} cannot be written ({str(error).splitlines()[0]}); is the disk full? {free:.1f} GiB are "
            "free. The older one is kept; free space, then continue with the same run.name"
        ) from error
    replace_text(folder / "about.json", json.dumps(about, indent=1))


def require_room(folder: Path, size: int) -> None:
    """Raises OSError if the disk of a folder has no room for `size` bytes: half a checkpoint would fill it for good.

    Some is left over: Ray Train writes its list of checkpoints in place, and a full disk would leave it empty.
    """
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of {size / 2**20:.0f} MiB does not fit, {free / 2**20:.0f} MiB are free; the ones before it "
            "are kept. Free space, then continue with the same run.name",
            str(folder),
        )


def load_state(folder: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, about) of a checkpoint folder.

    Raises:
        CheckpointError: it is damaged or incomplete; names the folder.
        OSError, MemoryError: it could not be read this time.
    """
    with _local(folder) as file:
        _compare(file)
        saved = torch.load(file, weights_only=True, map_location="cpu")
        return saved["state"], _with_step(saved["about"])


def about_of(folder: Place) -> dict[str, Any]:
    """`about` of a checkpoint, from its state, of which no tensors are read. Errors: `load_state`."""
    if isinstance(folder, Remote):
        try:
            with folder.filesystem.open_input_file((folder / "state.pt").key) as stream:
                return _about(stream)
        except Exception:  # noqa: BLE001 (damage, or a store that is away: a whole copy tells which)
            pass
    with _local(folder) as file, file.open("rb") as stream:
        return _about(stream)


def _about(stream: BinaryIO) -> dict[str, Any]:
    """Raises anything where the part without tensors is damaged."""
    with zipfile.ZipFile(stream) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                archive.read(name)  # compares its checksum
    stream.seek(0)
    return _with_step(torch.load(stream, map_location="meta", weights_only=True)["about"])


def _with_step(about: Any) -> dict[str, Any]:
    """Raises ValueError: it does not say of which update it is."""
    if not isinstance(about, dict) or type(about.get("step")) is not int:
        raise ValueError("it does not say of which update it is")
    return about


def check_state(folder: Place) -> None:
    """As `load_state`, of the checksums alone and in little memory; the same errors."""
    with _local(folder) as file:
        _compare(file)


def _compare(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"the checksum of {damaged} in {file.name} is wrong")


@contextmanager
def _local(folder: Place) -> Iterator[Path]:
    """The torch file on this machine. Damage that the block meets names the folder."""
    local = None
    try:
        with reading(folder) as local:
            yield local / "state.pt"
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (damage fails anywhere in zip and pickle, even with an IndexError)
        away = local is None and not isinstance(error, FileNotFoundError)  # a store, whose errors have no numbers
        if isinstance(error, OSError) and (away or error.errno not in DAMAGE):
            raise
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder}: damaged or incomplete checkpoint ({what})") from error
