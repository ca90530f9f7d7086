"""The export in a repository of the hub: the real client against a small server that speaks its protocol for uploads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from export_students import export_of
from hub_server import HubHandler, serving
from huggingface_hub import constants

TOKEN = "hf_secretSECRETsecret"
COMMIT = "c" * 40


class Hub(HubHandler):
    """Takes models of `me` from the holder of TOKEN: the way of the Git LFS batch API, without Xet."""

    created: list[dict] = []
    files: dict[str, bytes] = {}  # path -> contents, of the last commit
    blobs: dict[str, bytes] = {}  # sha256 -> contents
    commits: list[str] = []  # messages

    def _tell(self, status: int, value: object = None, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/me/student"):
            return self._tell(200, {"id": "me/student", "sha": "0" * 40, "siblings": []})
        return self._tell(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self._body()
        Hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self._tell(200)

    def do_POST(self) -> None:
        body, here = self._body(), f"http://{self.headers['Host']}"
        if self.path == "/api/validate-yaml":
            return self._tell(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._tell(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "me":
                return self._tell(403, {"error": "You don't have the rights to create a model there"})
            Hub.created.append(asked)
            return self._tell(200, {"url": f"{here}/me/student", "name": "me/student"})
        if self.path.startswith("/api/models/me/student/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self._tell(200, {"files": files})
        if self.path.endswith("info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{here}/blobs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._tell(200, {"transfer": "basic", "objects": objects})
        if self.path.startswith("/api/models/me/student/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    Hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    Hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    Hub.files[value["path"]] = Hub.blobs[value["oid"]]
            url = f"{here}/me/student/commit/{COMMIT}"
            return self._tell(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._tell(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[str]:
    """Its address, which the client in this process takes for the hub's, with TOKEN and no other one."""
    Hub.created, Hub.files, Hub.blobs, Hub.commits = [], {}, {}, []
    with serving(Hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield endpoint


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return export_of("sd15", 999, tmp_path_factory.mktemp("hub") / "mine" / "export").folder


@pytest.fixture
def push(run_script, hub, export):
    """`push(repository, *more)` -> (exit code, stdout, stderr) of the job."""
    return lambda repository, *more: run_script("export", export, "--format", "hub", "--repo", repository, *more)


def test_a_push_makes_a_private_repository_with_every_file_and_the_card(push, hub, export):
    (export / ".cache").mkdir()
    (export / ".cache" / "mine.json").write_text("{}")
    code, out, error = push("me/student")
    assert code == 0, error
    assert f"pushed    {hub}/me/student/commit/{COMMIT}" in out
    assert "terms     Teacher, shapes:flux: the project's own licence." in out
    assert out.splitlines()[-1].startswith("draw it   num_inference_steps=1, guidance_scale=0")
    assert [(asked["name"], asked["visibility"]) for asked in Hub.created] == [("student", "private")]
    assert len(Hub.commits) == 1
    files = [file for file in export.rglob("*") if file.is_file() and ".cache" not in file.parts]
    assert Hub.files == {str(file.relative_to(export)): file.read_bytes() for file in files}
    assert b"license:" in Hub.files["README.md"].split(b"---")[1]
    assert TOKEN not in out + error


def test_a_repository_is_public_on_wish_alone(push):
    assert push("me/student", "--public")[0] == 0
    assert Hub.created[-1]["visibility"] == "public"


@pytest.mark.parametrize(
    ("repository", "token", "said"),
    [
        ("me/student", None, "no valid token of the hub; set HF_TOKEN or run `hf auth login`"),
        ("me/student", "hf_other", "no valid token of the hub; set HF_TOKEN or run `hf auth login`"),
        ("others/student", TOKEN, "the token may not write there"),
    ],
)
def test_a_push_that_the_hub_refuses_ends_with_one_line(repository, token, said, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    code, out, error = push(repository)
    assert code == 2
    assert error.strip().splitlines()[-1].startswith(f"error: {repository}: {said}"), error
    assert not Hub.files
    assert "hf_" not in out + error


def test_a_hub_that_does_not_answer_is_named(push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, error = push("me/student")
    assert code == 2
    assert error.strip().splitlines()[-1].startswith("error: me/student: http://127.0.0.1:9: "), error
