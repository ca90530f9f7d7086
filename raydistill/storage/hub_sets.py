"""Data sets of the hub at one commit: hf://datasets/org/name[@revision]/… as hf://datasets/org/name@commit/…

A branch moves and a commit does not. So a revision is looked up once, and everybody reads what it was then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from raydistill.errors import InputError
from raydistill.storage.place import DENIED, as_os_errors, cause, remote

_COMMIT = re.compile(r"[0-9a-f]{40}")
# The hub's own branches have slashes: refs/convert/parquet, refs/pr/3.
_SET = re.compile(
    r"datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:convert/[\w-]+|pr/\d+)|[\w.%-]+))?(?P<path>/.*)?"
)
ANSWER_S = 60.0  # for which the hub is waited for


def is_hub_set(text: str) -> bool:
    """Whether `text` names files of a data set of the hub."""
    return text.startswith("hf://")


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision of org/name is at now; "": the main branch. Raises the hub's errors, as OSError."""
    from huggingface_hub import HfApi  # slow to import

    with as_os_errors():
        return HfApi().dataset_info(repo, revision=revision or None, timeout=ANSWER_S).sha


def pinned_set(uri: str, look_up: Callable[[str, str], str] = commit_of) -> str:
    """The URI with the commit that its revision, or the main branch, is at now. One that names a commit stays.

    Args:
        look_up: `commit_of`, or one that remembers.

    Raises:
        InputError: it names no data set, no such revision, or one that may not be read.
        OSError: the hub does not answer.
    """
    repo, revision, path = _parts(uri)
    if _COMMIT.fullmatch(revision):
        return uri
    from huggingface_hub import errors  # slow to import

    try:
        return f"hf://datasets/{repo}@{look_up(repo, revision)}{path}"
    except errors.RevisionNotFoundError:
        raise InputError(f"{uri}: the hub has no revision {revision or 'main'} of datasets/{repo}") from None
    except OSError as error:
        text = cause(error, "hf")
        refused = isinstance(error, errors.RepositoryNotFoundError) or DENIED.search(text)
        raise (InputError if refused else OSError)(f"{uri}: its commit cannot be looked up: {text}") from error


def same_but_for_commit(uri: str, other: str) -> bool:
    """Whether `uri` leaves the revision open that `other` names."""
    if not (is_hub_set(uri) and is_hub_set(other)):
        return False
    try:
        (repo, revision, path), (other_repo, _, other_path) = _parts(uri), _parts(other)
    except InputError:
        return False
    return not revision and (repo, path) == (other_repo, other_path)


def _parts(uri: str) -> tuple[str, str, str]:
    """(org/name, revision or "", path with its slash or ""). Raises InputError."""
    found = _SET.fullmatch(remote(uri).key)
    return found["repo"], unquote(found["revision"] or ""), found["path"] or ""
