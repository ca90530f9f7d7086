"""Files by URI: `s3://bucket/key` and `gs://bucket/key`, through pyarrow.fs, which Ray Train uses for checkpoints too.

Inputs are staged: fetched once a node into a cache ($RAYDISTILL_CACHE, default ~/.cache/raydistill), then read as local
files. Outputs are a `Place`: a local path, or a `Remote`, whose methods are named and mean as pathlib's. An object is
replaced in one step; there are no folders, no renames and no appending.

Credentials, region and endpoint come from where the SDKs look for them (AWS_ACCESS_KEY_ID …, AWS_PROFILE,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, the machine's role). A URI that carries any is refused, so that none can
reach a log, a file or MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raydistill.config import ConfigError, is_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

RETRIES, RETRY_S = 8, 60  # attempts of a request to S3; seconds for which one to GCS is tried again
STAGED = re.compile(r".*/staged/(?P<digest>[0-9a-f]{16})/(?P<scheme>s3|gs)/(?P<key>.+)")
_DENIED = re.compile(
    r"AWS Error [A-Z_]*(ACCESS|TOKEN|SIGNATURE|CREDENTIAL|CLIENT)|HTTP status 40[13]|UNAUTHENTICATED|PERMISSION_DENIED"
)
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's service account",
}


@dataclass(frozen=True)
class Remote:
    """An object, or the objects below a prefix. Methods raise OSError where the store does not do what is asked."""

    scheme: str  # s3 or gs
    key: str  # bucket/key

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> Remote:
        return Remote(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.scheme, self.key.rpartition("/")[0])

    @property
    def filesystem(self) -> FileSystem:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _filesystem(self.scheme, self.key.partition("/")[0], endpoint)

    # -- as pathlib --------------------------------------------------------------------------------
    def resolve(self) -> Remote:
        return self

    def is_dir(self) -> bool:
        from pyarrow.fs import FileType

        return self.filesystem.get_file_info(self.key).type == FileType.Directory

    def is_file(self) -> bool:
        return self.filesystem.get_file_info(self.key).is_file

    def exists(self) -> bool:
        from pyarrow.fs import FileType

        return self.filesystem.get_file_info(self.key).type != FileType.NotFound

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.key) as stream:
            return stream.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
            file = Path(folder, "data")
            file.write_bytes(data)
            self.upload(file)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def touch(self) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there as soon as an object is."""

    def iterdir(self) -> list[Remote]:
        """Objects and prefixes one level below, by name; empty where there is nothing."""
        from pyarrow.fs import FileSelector

        infos = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True))
        return sorted((self / info.base_name for info in infos), key=str)

    # -- beyond it ---------------------------------------------------------------------------------
    def entries(self) -> list[tuple[str, int, int]]:
        """(name below this, bytes, time of the last change in ns) of every object; its own name is "". By name."""
        from pyarrow.fs import FileSelector

        info = self.filesystem.get_file_info(self.key)
        if info.is_file:
            return [("", info.size, info.mtime_ns)]
        infos = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True, recursive=True))
        start = len(self.key) + 1
        return sorted((info.path[start:], info.size, info.mtime_ns) for info in infos if info.is_file)

    def upload(self, source: Path) -> None:
        """Store a file, or a folder's files, its top level's .json ones last: they tell readers that the rest is there.

        Each by one call that no signal interrupts: an arrow stream that is left by an exception stores what it has.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        here = LocalFileSystem()
        below = ((Path(parent, name) for name in names) for parent, _, names in os.walk(source, followlinks=True))
        files = [source] if source.is_file() else itertools.chain.from_iterable(below)
        for file in sorted(files, key=lambda file: (file.parent == source and file.suffix == ".json", file)):
            target = self if file == source else self / file.relative_to(source).as_posix()
            copy_files(str(file), target.key, source_filesystem=here, destination_filesystem=target.filesystem)

    def download(self, target: Path) -> None:
        """Fetch the object, or all below the prefix, to a path that does not exist yet. Raises FileNotFoundError."""
        from pyarrow.fs import LocalFileSystem, copy_files

        (target.parent if self.is_file() else target).mkdir(parents=True, exist_ok=True)
        copy_files(self.key, str(target), source_filesystem=self.filesystem, destination_filesystem=LocalFileSystem())


Place = Path | Remote


@functools.lru_cache
def _filesystem(scheme: str, bucket: str, endpoint: str | None) -> FileSystem:
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=RETRY_S))
    return fs.S3FileSystem(
        region=os.environ.get("AWS_REGION", "us-east-1") if endpoint else fs.resolve_s3_region(bucket),
        endpoint_override=endpoint,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES),
    )


def remote(uri: str) -> Remote:
    """What a URI names. Raises ConfigError: another scheme, no bucket, or credentials or options inside."""
    from raydistill.runs import mask

    scheme, _, key = uri.partition("://")
    bucket = key.partition("/")[0]
    if scheme not in _CREDENTIALS:
        raise ConfigError(f"{mask('uri', uri)}: unknown scheme {scheme}://; use s3://, gs://, file:// or a path")
    if "@" in bucket or ":" in bucket or "?" in key or "#" in key:  # a secret may hold slashes
        raise ConfigError(
            f"{scheme}://…: credentials and options do not belong in a URI; they are read from the environment "
            f"({_CREDENTIALS[scheme]}{'; AWS_ENDPOINT_URL' if scheme == 's3' else ''})"
        )
    parts = PurePosixPath(key).parts
    if not bucket or ".." in parts:
        raise ConfigError(f"{uri}: not a bucket and a key, as in {scheme}://bucket/folder/file")
    return Remote(scheme, "/".join(parts))


def place(text: str) -> Place:
    """Where outputs go: a local path, or a URI's place. Raises ConfigError as `remote`."""
    from raydistill.config import local_path

    return remote(text) if is_uri(text) and not text.startswith("file://") else local_path(text)


def argument(text: str) -> Place:
    """`place` for argparse."""
    try:
        return place(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_argument(text: str) -> Path:
    """For argparse: a path, or file://."""
    found = argument(text)
    if isinstance(found, Remote):
        raise argparse.ArgumentTypeError(f"{found}: must be a folder of this machine, or of a file system that it sees")
    return found


def cause(error: OSError, scheme: str) -> str:
    """Why a store refuses, in one line without secrets; where it is about credentials, which ones are read."""
    from raydistill.runs import reason

    text = reason(error)
    denied = _DENIED.search(text) or "OAuth2 access token" in text  # so GCS, without any
    hint = f"no credentials that allow it; they are read from {_CREDENTIALS[scheme]}: " if denied else ""
    return hint + text


# -- inputs: staged once a node ---------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("RAYDISTILL_CACHE", "~/.cache/raydistill")).expanduser().absolute()


def stage(uri: str) -> Path:
    """The local copy of an object, or of all objects below a prefix, as they are now; fetched where it is missing.

    Its last name is the URI's. Of several processes one fetches, and the others wait for it.

    Raises:
        ConfigError: a wrong URI, nothing there, or no credentials.
        OSError: the store does not answer, or the disk is full.
    """
    source = remote(uri)
    entries = _entries(source)
    return _staged(source, _digest(source, entries), entries)


def present(path: str | Path) -> Path:
    """A path as another node gave it: what it has staged, or fetched from the hub, is fetched here too, the same version.

    Raises as `stage`; ConfigError also where the objects have changed meanwhile.
    """
    path = Path(path)
    match = STAGED.fullmatch(str(path))
    if path.exists():
        return path
    if match is None:
        from raydistill.hub import counterpart

        return counterpart(path)
    source = Remote(match["scheme"], match["key"])
    entries = _entries(source)
    if _digest(source, entries) != match["digest"]:
        raise ConfigError(f"{source}: has changed since it was read by the process that started this one; start again")
    return _staged(source, match["digest"], entries)


def _entries(source: Remote) -> list[tuple[str, int, int]]:
    try:
        entries = source.entries()
    except OSError as error:
        text = cause(error, source.scheme)
        raise (ConfigError if _DENIED.search(text) else OSError)(f"{source}: cannot be read: {text}") from error
    if not entries:
        raise ConfigError(f"{source}: no such object, and none below it")
    for name, *_ in entries:
        if ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{source}: the name of {name!r} leads out of the folder")
    return entries


def _digest(source: Remote, entries: list[tuple[str, int, int]]) -> str:
    return hashlib.sha256(json.dumps([str(source), entries]).encode()).hexdigest()[:16]


def _staged(source: Remote, digest: str, entries: list[tuple[str, int, int]]) -> Path:
    """`<cache>/staged/<digest>/<scheme>/<bucket>/<key>`, whole: its first folder is moved there in one step."""
    cache = cache_folder() / "staged"
    whole, unfinished = cache / digest, cache / f".{digest}"
    target = Path(source.scheme, source.key)
    if (whole / target).exists():
        return whole / target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        if not (whole / target).exists():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            _fetch(source, unfinished / target, entries)
            unfinished.replace(whole)
    return whole / target


def _fetch(source: Remote, target: Path, entries: list[tuple[str, int, int]]) -> None:
    size, free = sum(size for _, size, _ in entries), shutil.disk_usage(cache_folder()).free
    if size > free:
        raise OSError(
            f"{source}: {size / 2**20:.0f} MiB do not fit into {cache_folder()}, which has {free / 2**20:.0f}; make room, "
            "or name another folder in RAYDISTILL_CACHE"
        )
    try:
        source.download(target)
    except OSError as error:
        raise OSError(f"{source}: cannot be fetched: {cause(error, source.scheme)}") from error
    for name, size, _ in entries:
        if (found := (target / name if name else target).stat().st_size) != size:
            raise OSError(f"{source}: {name} came with {found} of {size} bytes; has it been written meanwhile?")


# -- outputs ----------------------------------------------------------------------------------------------


def staged(source: Place) -> Path:
    """A path to read from: a `Remote` is staged. Raises as `stage`."""
    return stage(str(source)) if isinstance(source, Remote) else source


@contextlib.contextmanager
def writing(target: Place) -> Iterator[Path]:
    """A local path to write a file or folder to: `target` itself, or one that is stored there at the block's end."""
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
        yield Path(folder, target.name)
        target.upload(Path(folder, target.name))


@contextlib.contextmanager
def reading(source: Place) -> Iterator[Path]:
    """A local path to read a file or folder from, for the length of the block: `source` itself, or a copy."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
        source.download(Path(folder, source.name))
        yield Path(folder, source.name)


def replace_text(file: Place, text: str) -> None:
    """Write a small file in one move, and the folder it lies in.

    A reader sees the old file or the new one, whole, also after a kill or on a full disk.
    """
    if isinstance(file, Remote):
        file.write_text(text)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def move_folder(source: Place, target: Place) -> None:
    """Move a folder's files into another folder, where they replace those of their names."""
    with reading(source) as local:
        if isinstance(target, Remote):
            target.upload(local)
        else:
            shutil.copytree(local, target, dirs_exist_ok=True)
    if isinstance(source, Remote):
        source.filesystem.delete_dir(source.key)
    else:
        shutil.rmtree(source)


def require_folder(storage: Place, what: str) -> None:
    """Raises ConfigError for a URI."""
    if isinstance(storage, Remote):
        raise ConfigError(f"storage: {storage}: {what} needs a folder that every node sees, and goes by no URI")


def for_ray_train(folder: Place) -> dict[str, Any]:
    """Arguments of Ray Train's RunConfig that have it keep its checkpoints in a folder."""
    if isinstance(folder, Path):
        return {"storage_path": str(folder)}
    return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
