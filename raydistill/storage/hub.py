"""Models of the Hugging Face hub: downloaded once a node, then read from the cache.

The cache is the hub client's own ($HF_HOME, default ~/.cache/huggingface). Where nodes share it, the driver downloads and
all others read. Where each has its own disk, the first process of a node that needs a model fetches it, and the others
wait. So a replica on a new node starts by itself. Weights are safetensors, never pickles.

A token comes from HF_TOKEN, or from `hf auth login`, which writes it to $HF_HOME. The hub's client reads it, and it appears
in no message, file or log of this project. Therefore no driver hands its own to other nodes: the variables of a
runtime environment stand in Ray's dashboard and logs. Where nodes do not share $HF_HOME, each needs HF_TOKEN itself.

huggingface_hub is imported inside functions: it is slow to import, and a run of local folders has no use for it.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from raydistill.errors import InputError

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
# One file of a repository: org/name[@revision]/folder/file.safetensors; without a file, the one that LoRAs have there.
HUB_FILE = re.compile(HUB_ID.pattern + r"(/(?P<file>[A-Za-z0-9][\w./-]*\.safetensors))?")
LORA_FILE = "pytorch_lora_weights.safetensors"
# Files of a pipeline's parts; weights at the top of a repository are other formats of the same networks.
# The chat template of newer tokenizers (.jinja) is part of what FLUX.2's text encoder reads.
ALLOWED = ["model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja"]
VARIANTS = ["*.fp16.*", "*.fp16-*"]  # only taken where there is nothing else (Kolors)
IGNORED = ["*.bf16.*", "*.non_ema.*", "safety_checker/*", "image_encoder/*", "vae_1_0/*"]
# A file of a model in the cache of whichever node.
SNAPSHOT = re.compile(
    r".*/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(?:/(?P<rest>.*))?"
)


def is_hub_id(text: str) -> bool:
    """Whether `text` reads as org/name or org/name@revision."""
    return HUB_ID.fullmatch(text) is not None


def _repo_and_revision(model: str) -> tuple[str, str | None]:
    match = HUB_ID.fullmatch(model)
    if match is None:
        raise InputError(f"{model}: not a model of the hub (org/name or org/name@revision)")
    return match["repo"], match["revision"]


def cached(model: str) -> Path:
    """The folder of a hub model in this machine's cache; asks no network. Raises InputError where it is missing."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = _repo_and_revision(model)
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=["model_index.json"], local_files_only=True)
    except LocalEntryNotFoundError:
        raise InputError(f"{model}: neither a folder here nor in the hub cache {constants.HF_HUB_CACHE}") from None
    return Path(folder)


def on_this_node(model: str) -> Path:
    """The folder of a hub model. Where this node's cache lacks it, one process fetches it and the others wait.

    Raises InputError: see `download`.
    """
    if not _mark(model).is_file():
        with _locked(model):
            if not _mark(model).is_file():
                return download(model)
    return cached(model)


def counterpart(path: Path) -> Path:
    """A path in another node's hub cache, as it is in this node's. Other paths stay. Raises as `on_this_node`."""
    match = SNAPSHOT.fullmatch(str(path))
    if match is None or path.exists():
        return path
    folder = on_this_node(f"{match['org']}/{match['name']}@{match['revision']}")
    return folder / match["rest"] if match["rest"] else folder


def pinned(model: str) -> str:
    """org/name@commit of what org/name means now, which is fetched. A revision that was named stays.

    Raises InputError: see `download`.
    """
    repo, revision = _repo_and_revision(model)
    return model if revision else f"{repo}@{download(model).name}"


def same_but_for_revision(model: str, other: str) -> bool:
    """Whether `model` leaves the revision open that `other` names."""
    one, two = HUB_FILE.fullmatch(model), HUB_FILE.fullmatch(other)
    if one is None or two is None or one["revision"]:
        return False
    return (one["repo"], one["file"]) == (two["repo"], two["file"])


# -- single files ------------------------------------------------------------------------------------------


def is_hub_file(text: str) -> bool:
    """Whether `text` reads as org/name[@revision][/file.safetensors]."""
    match = HUB_FILE.fullmatch(text)
    return match is not None and ".." not in text.split("/")


def fetch_file(text: str) -> Path:
    """The file that org/name[@revision][/file.safetensors] names, from this machine's cache where it is there.

    Raises InputError: as `download`, or the repository has no such file.
    """
    from huggingface_hub import errors, hf_hub_download

    match = HUB_FILE.fullmatch(text)
    file = match["file"] or LORA_FILE
    with _problems_of(text, match["repo"], match["revision"]):
        try:
            return Path(hf_hub_download(match["repo"], file, revision=match["revision"]))
        except errors.RemoteEntryNotFoundError:
            raise InputError(f"{text}: the repository has no {file}; name one, as org/name/file.safetensors") from None


def pinned_file(text: str) -> str:
    """As `pinned`, of one file."""
    match = HUB_FILE.fullmatch(text)
    if match["revision"]:
        return text
    commit = SNAPSHOT.fullmatch(str(fetch_file(text)))["revision"]
    return f"{match['repo']}@{commit}{'/' + match['file'] if match['file'] else ''}"


def _mark(model: str) -> Path:
    """A file that says that all of the model is in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, ".raydistill", model.replace("/", "--"))


@contextlib.contextmanager
def _locked(model: str) -> Iterator[None]:
    """One process of this node at a time. The lock ends with its holder."""
    file = _mark(model).with_name(f"{_mark(model).name}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that may only be read needs no lock
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(file, fallback_to_soft=False))
        yield


def download(model: str) -> Path:
    """Fetch what is missing of a hub model, and return its folder. Without network, a complete copy in the cache serves.

    Raises:
        InputError: no network and no complete copy, an unknown model or revision, or one whose licence must be
            accepted first. The message says what to do.
    """
    repo, revision = _repo_and_revision(model)
    with _problems_of(model, repo, revision):
        folder = _fetch(repo, revision)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{model}: not a diffusers pipeline (no model_index.json)")
    with contextlib.suppress(OSError):  # a cache that may only be read: it is looked through again next time
        _mark(model).parent.mkdir(parents=True, exist_ok=True)
        _mark(model).touch()
    return folder


@contextlib.contextmanager
def _problems_of(model: str, repo: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises inside the block, as InputError that names the model and what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
        return
    except errors.GatedRepoError:
        problem = _gated(repo)
    except errors.RevisionNotFoundError:
        problem = f"the hub has no revision {revision or 'main'} of it"
    except errors.RepositoryNotFoundError:
        problem = "neither a folder here nor a model of the hub that can be read without (another) HF_TOKEN"
    except errors.LocalEntryNotFoundError:  # also an incomplete copy
        problem = (
            f"neither a folder here nor complete in the hub cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} "
            "cannot be reached. Start where there is a network, or name a folder"
        )
    except errors.HfHubHTTPError as error:
        problem = f"the hub answers with status {error.response.status_code}"
    raise InputError(f"{model}: {problem}")


def _gated(repo: str) -> str:
    """What is missing for a model whose licence must be accepted first, and what to do."""
    from huggingface_hub import constants, get_token

    page, node = f"{constants.ENDPOINT}/{repo}", socket.gethostname()
    if get_token() is None:
        return (
            f"gated, and node {node} has no token. Accept its licence at {page}, and set HF_TOKEN on every node before "
            "Ray starts there; where nodes share HF_HOME, `hf auth login` on one of them will do"
        )
    return f"gated, and the token of node {node} may not read it. Accept its licence at {page}, as the token's owner"


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=IGNORED + VARIANTS)
    )
    bare = [c.parent for c in folder.glob("*/config.json") if not any(c.parent.glob("*.safetensors"))]
    if bare:
        files = [f"{part.name}/*.{suffix}" for part in bare for suffix in ("safetensors", "json")]
        snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=IGNORED)
        for part in bare:
            _name_plainly(part)
    return folder


def _name_plainly(part: Path) -> None:
    """Links under the names that loaders look for; the shards of a large network keep theirs, which its index knows."""
    for file in (*part.glob("*.fp16.safetensors"), *part.glob("*.safetensors.index.fp16.json")):
        plain = part / file.name.replace(".fp16", "")
        if not plain.exists():
            plain.symlink_to(file.name)
