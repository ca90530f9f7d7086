"""Sets of small pictures in the forms that people publish."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydistill.diffusion.noise import uniform


def png(number: int, width: int = 64, height: int = 64) -> bytes:
    """A noise picture, of which no two numbers have the same."""
    pixels = (uniform(number, [0], "picture", shape=(height, width, 3))[0] * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(file: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def write_tars(folder: Path, lengths: Iterable[int]) -> int:
    """00000.tar …, samples of a .png and a .txt, `cap 0` on; returns how many."""
    number = 0
    folder.mkdir(parents=True, exist_ok=True)
    for index, length in enumerate(lengths):
        samples = range(number, number + length)
        write_tar(
            folder / f"{index:05d}.tar",
            [member for n in samples for member in ((f"{n:06d}.png", png(n)), (f"{n:06d}.txt", f"cap {n}"))],
        )
        number += length
    return number


def write_hub_parquet(file: Path, numbers: Iterable[int], columns: Mapping[str, list] | None = None, **options) -> Path:
    """A file as `datasets` pushes it: structs {bytes, path}."""
    numbers = list(numbers)
    image = pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in numbers])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image, **(columns or {"text": [f"cap {n}" for n in numbers]})}), file, **options)
    return file
