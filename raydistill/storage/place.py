"""A `Place`: a local path, or a `Remote` in a bucket (`s3://bucket/key`, `gs://bucket/key`) or in a data set of the hub.

A Remote goes through pyarrow.fs, as Ray Train's checkpoints do. Its methods have pathlib's names and meanings. An object is
replaced in one step. A bucket has no folders, no renames and no appending.

`hf://datasets/org/name[@revision]/path` goes through huggingface_hub's file system behind pyarrow's, and is read alone. HF_ENDPOINT
names another hub, and HF_TOKEN, or `hf auth login`, opens gated sets. A change of bytes shows in `entries`.

Credentials, region and endpoint come from where the SDKs look for them (AWS_ACCESS_KEY_ID …, AWS_PROFILE,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, the machine's role). A URI that carries any is refused, so that none can
reach a log, a file or MLflow.

pyarrow is imported inside functions: most processes that hold a Place never touch a bucket, and it is slow to import.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raydistill.errors import InputError, mask, reason
from raydistill.storage import lease

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
RETRIES, RETRY_S = 8, 60  # attempts of a request to S3; seconds for which one to GCS is tried again
DENIED = re.compile(
    r"AWS Error [A-Z_]*(ACCESS|TOKEN|SIGNATURE|CREDENTIAL|CLIENT)|HTTP status 40[13]|UNAUTHENTICATED|PERMISSION_DENIED"
    r"|40[13] Client Error"
)
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's service account",
    "hf": "HF_TOKEN, or what `hf auth login` has written; a gated set's licence must be accepted on its page first",
}
_HUB_SET = re.compile(r"datasets/[\w.-]+/[\w.-]+(@[\w.%-]+)?")
_HUB_BLOCK = 8 << 20  # bytes of one request to the hub


@dataclass(frozen=True)
class Remote:
    """An object, or the objects below a prefix. Methods raise OSError where the store refuses or does not answer."""

    scheme: str  # s3, gs or hf
    key: str  # bucket/key, or datasets/org/name[@revision]/path

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

        return self._info().type == FileType.Directory

    def is_file(self) -> bool:
        return self._info().is_file

    def exists(self) -> bool:
        from pyarrow.fs import FileType

        return self._info().type != FileType.NotFound

    def _info(self) -> FileInfo:
        with as_os_errors():
            return self.filesystem.get_file_info(self.key)

    def read_bytes(self) -> bytes:
        with as_os_errors(), self.filesystem.open_input_stream(self.key) as stream:
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
        lease.check(self)
        try:
            self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a prefix exists as soon as an object below it does."""

    def iterdir(self) -> list[Remote]:
        """Objects and prefixes one level below, by name; empty where there is nothing."""
        from pyarrow.fs import FileSelector

        with as_os_errors():
            infos = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True))
        return sorted((self / info.base_name for info in infos), key=str)

    # -- beyond it ---------------------------------------------------------------------------------
    def entries(self) -> list[tuple[str, int, int]]:
        """(name below this, bytes, time of the last change in ns) of every object; its own name is "". By name."""
        from pyarrow.fs import FileSelector

        if self.scheme == "hf":
            return self._hub_entries()
        info = self.filesystem.get_file_info(self.key)
        if info.is_file:
            return [("", info.size, info.mtime_ns)]
        infos = self.filesystem.get_file_info(FileSelector(self.key, allow_not_found=True, recursive=True))
        start = len(self.key) + 1
        return sorted((info.path[start:], info.size, info.mtime_ns) for info in infos if info.is_file)

    def _hub_entries(self) -> list[tuple[str, int, int]]:
        """`entries`; the hub tells no times, but a hash of each file's bytes, which stands for them."""
        hub = self.filesystem.handler.fs
        with as_os_errors():
            hub.invalidate_cache()  # a branch may have moved
            found = hub.find(self.key, detail=True)
        start = len(self.key) + 1
        return sorted((name[start:], info["size"], int(info["blob_id"][:12], 16)) for name, info in found.items())

    def upload(self, source: Path) -> None:
        """Store a file, or a folder's files. The top level's .json files come last: they tell readers that the rest is there.

        Each file takes one call that no signal interrupts: an arrow stream that an exception ends stores what it has.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        lease.check(self)
        if self.scheme == "hf":
            raise OSError(f"{self}: a data set of the hub is read alone")
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
        with as_os_errors():
            copy_files(
                self.key, str(target), source_filesystem=self.filesystem, destination_filesystem=LocalFileSystem()
            )


Place = Path | Remote


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """The hub's client raises errors of its HTTP library, which are none of the system's, where the network is away."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not type(error).__module__.startswith("httpx"):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_link(place: Place) -> bool:
    """Also one that leads nowhere; a bucket has none."""
    return isinstance(place, Path) and place.is_symlink()


@functools.lru_cache
def _filesystem(scheme: str, bucket: str, endpoint: str | None) -> FileSystem:
    from pyarrow import fs

    if scheme == "hf":
        from huggingface_hub import HfFileSystem  # slow to import

        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem(block_size=_HUB_BLOCK)))
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=RETRY_S))
    return fs.S3FileSystem(
        region=os.environ.get("AWS_REGION", "us-east-1") if endpoint else fs.resolve_s3_region(bucket),
        endpoint_override=endpoint,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES),
    )


def is_uri(text: str) -> bool:
    """Whether `text` reads as scheme://something."""
    return _URI.match(text) is not None


def remote(uri: str) -> Remote:
    """What a URI names. Raises InputError: another scheme, no bucket, or credentials or options inside."""
    scheme, _, key = uri.partition("://")
    bucket = key.partition("/")[0]
    if scheme not in _CREDENTIALS:
        raise InputError(f"{mask('uri', uri)}: unknown scheme {scheme}://; use s3://, gs://, hf://, file:// or a path")
    if scheme == "hf":
        return _of_hub(uri, key)
    if "@" in bucket or ":" in bucket or "?" in key or "#" in key:  # a secret may hold slashes
        raise InputError(
            f"{scheme}://…: credentials and options do not belong in a URI; they are read from the environment "
            f"({_CREDENTIALS[scheme]}{'; AWS_ENDPOINT_URL' if scheme == 's3' else ''})"
        )
    segments = PurePosixPath(key).parts
    if not bucket or ".." in segments:
        raise InputError(f"{uri}: not a bucket and a key, as in {scheme}://bucket/folder/file")
    return Remote(scheme, "/".join(segments))


def _of_hub(uri: str, key: str) -> Remote:
    segments = PurePosixPath(key).parts
    if ".." in segments or not _HUB_SET.fullmatch("/".join(segments[:3])):
        form = "hf://datasets/org/name[@revision]/path"
        raise InputError(f"{mask('uri', uri)}: not a data set of the hub, as in {form}")
    return Remote("hf", "/".join(segments))


def cause(error: Exception, scheme: str) -> str:
    """Why a store refuses, in one line without secrets. About credentials it says which ones are read."""
    text = reason(error)
    denied = DENIED.search(text) or "OAuth2 access token" in text  # so GCS, without any
    hint = f"no credentials that allow it; they are read from {_CREDENTIALS[scheme]}: " if denied else ""
    return hint + text


def for_ray_train(folder: Place) -> dict[str, Any]:
    """Arguments of Ray Train's RunConfig that have it keep its checkpoints in a folder."""
    if isinstance(folder, Path):
        return {"storage_path": str(folder)}
    return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
