"""What a teacher service computes: its model, by content, and its settings. Two runs share a service only if these agree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import raydistill
from raydistill.config.schema import TeacherServiceConfig

BLOCK_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 12  # of a weight file: its first block whole, then a sample of every block
SETTINGS_OF_SCORES = ("dtype", "slice", "shards", "threads_per_rank")  # they decide the bits of an answer
SETTINGS_OF_CLIENTS = {"service", "linger_s", "start_timeout_s", "retry_for_s"}  # they do not change the service itself


def identify(model_folder: str, config: TeacherServiceConfig) -> dict[str, Any]:
    """Folder, fingerprint, settings and version of a teacher service, as JSON types."""
    folder = Path(model_folder).resolve()
    return {
        "folder": str(folder),
        "fingerprint": fingerprint(folder),
        "config": config.model_dump(exclude=SETTINGS_OF_CLIENTS),
        "version": raydistill.__version__,
    }


def differences(running: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Why the answers of a running service are not those of the wanted one; empty: they are the same bits."""
    found = []
    if running["fingerprint"] != wanted["fingerprint"]:
        found.append(f"its model is {running['folder']}, and {wanted['folder']} is another one (teacher.model)")
    for key in SETTINGS_OF_SCORES:
        has, wants = running["config"][key], wanted["config"][key]
        if has != wants:
            found.append(f"teachers.{key}: it runs with {has!r}, not {wants!r}")
    return found


def fingerprint(folder: Path) -> str:
    """Hash of a diffusers folder: JSON files whole; name, size and samples of each weight file.

    The first MiB of a weight file is read whole. It holds the safetensors header: the name and shape of every tensor.
    Each further MiB is sampled with 4 kB. So 24 GB take seconds, and a change to a tensor of 1 MB or more shows.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix not in (".json", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as data:
            if file.suffix == ".json":
                digest.update(data.read())
                continue
            digest.update(data.read(BLOCK_BYTES))
            for start in range(BLOCK_BYTES, size, BLOCK_BYTES):
                data.seek(start)
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()
