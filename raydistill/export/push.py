"""The export's folder, with its model card, to the Hugging Face hub or a server that speaks its protocol.

The client reads the token from HF_TOKEN or `hf auth login`; it appears in no message. It is imported inside functions: it
is slow to import.
"""

from __future__ import annotations

from pathlib import Path

from raydistill.errors import InputError, reason
from raydistill.storage.hub import HUB_ID

IGNORED = [".*", "*.tmp", "*.lock"]


def check_repository(name: str | None) -> str:
    """Raises InputError where `name` is not org/name."""
    match = HUB_ID.fullmatch(name or "")
    if match is None or match["revision"]:
        raise InputError(f"--repo {name}: the hub's repository as org/name is needed")
    return match["repo"]


def push(folder: Path, repository: str, public: bool) -> str:
    """Make the repository where there is none, and upload the folder as one commit.

    Args:
        public: a new repository's visibility. That of an existing one stays.

    Returns the address of the commit.

    Raises:
        InputError: no token, no right to write, no such organisation, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="One-step student, written by raydistill",
            ignore_patterns=IGNORED,
        )
    except LocalTokenNotFoundError:
        raise InputError(f"{repository}: no token of the hub; set HF_TOKEN or run `hf auth login`") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = {
            401: "no valid token of the hub; set HF_TOKEN or run `hf auth login`",
            403: "the token may not write there",
        }.get(status, reason(error))
        raise InputError(f"{repository}: {hint} ({api.endpoint}, status {status})") from None
    except Exception as error:  # the client's HTTP library, another one by its version, has its own
        raise InputError(f"{repository}: {api.endpoint}: {reason(error)}") from error
    return done.commit_url
