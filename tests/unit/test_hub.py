"""Hub models against a small server that speaks the hub's protocol: the real client, its real cache, no network."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import HubHandler, serving

from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.storage.hub import download, is_hub_file, is_hub_id, same_but_for_revision
from raydistill.storage.resolve import check_paths, resolve

SHA, LATER = "a" * 40, "b" * 40
TOKEN = "hf_secretSECRETsecret"
FILES = {
    "model_index.json": b'{"_class_name": "KolorsPipeline"}',
    "README.md": b"read me",
    "one_file_with_everything.safetensors": b"not this one",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.txt": b"a",
    "tokenizer/tokenizer.model": b"m",
    "tokenizer/chat_template.jinja": b"{{ x }}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"only half precision",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"full precision",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half precision",
    "vae/diffusion_pytorch_model.pt": b"a pickle",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.fp16-00001-of-00002.safetensors": b"one",
    "text_encoder/model.fp16-00002-of-00002.safetensors": b"two",
    "text_encoder/model.safetensors.index.fp16.json": b'{"weight_map": {}}',
    "text_encoder/pytorch_model.bin": b"a pickle",
    "safety_checker/model.safetensors": b"unused",
}
FETCHED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer.model",
    "tokenizer/chat_template.jinja",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.fp16.json",
}
LINKS = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors.index.json"}


class Hub(HubHandler):
    """Serves org/kolors to everybody, the files of org/gated to the holder of TOKEN, and knows nothing else."""

    seen: list[tuple[str, str | None]] = []
    main = SHA  # the commit of org/kolors that is published

    def do_GET(self) -> None:
        Hub.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if path.startswith("/org/gated/resolve/") and (given := self.headers.get("Authorization")) != f"Bearer {TOKEN}":
            return self._send(403 if given else 401, X_Error_Code="GatedRepo", X_Error_Message="awaiting review")
        path = path.replace("org/gated", "org/kolors", 1)
        commits = {"/revision/main": Hub.main, "": Hub.main} | {
            f"/revision/{commit}": commit for commit in (SHA, LATER)
        }
        if (commit := commits.get(path.removeprefix("/api/models/org/kolors"))) is not None:
            return self._send(200, json.dumps({"id": "org/kolors", "sha": commit, "siblings": []}).encode())
        if path.startswith("/api/models/org/kolors/revision/"):
            return self._send(404, X_Error_Code="RevisionNotFound")
        if path in (f"/api/models/org/kolors/tree/{commit}" for commit in (SHA, LATER)):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            return self._send(200, json.dumps(tree).encode())
        commit, _, name = path.removeprefix("/org/kolors/resolve/").partition("/")
        if name in FILES:
            etag = hashlib.sha1(FILES[name]).hexdigest()
            return self._send(
                200, FILES[name], ETag=f'"{etag}"', X_Repo_Commit=Hub.main if commit == "main" else commit
            )
        if path.startswith("/org/kolors/resolve/"):
            return self._send(404, X_Error_Code="EntryNotFound")
        return self._send(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.seen, Hub.main = [], SHA
    with serving(Hub) as address:
        yield address


def ask(code: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own: the client reads its environment once, when it is imported."""
    code = (
        f"from raydistill.storage.hub import download, cached\nfrom raydistill.storage.resolve import resolve\n{code}"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def test_a_download_takes_safetensors_and_text_never_pickles_and_hides_the_token(hub, tmp_path):
    done = ask("print(download('org/kolors'))", hub, tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    assert found == FETCHED | LINKS
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == b"only half precision"
    assert (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes() == b"full precision"
    assert f"Bearer {TOKEN}" in {token for _, token in Hub.seen}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_after_a_download_no_network_is_needed_and_workers_ask_for_none(hub, tmp_path):
    first = ask("print(download('org/kolors'))", hub, tmp_path)
    asked = len(Hub.seen)
    worker = ask("print(resolve('org/kolors'))", hub, tmp_path)
    assert worker.stdout == first.stdout
    assert len(Hub.seen) == asked
    offline = ask("print(download('org/kolors'))", "http://127.0.0.1:9", tmp_path)
    assert offline.stdout == first.stdout, offline.stderr


@pytest.mark.parametrize(
    ("model", "endpoint", "message"),
    [
        ("org/nothing", None, "neither a folder here nor a model of the hub that can be read without"),
        ("org/kolors@v9", None, "the hub has no revision v9"),
        ("org/kolors", "http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_line(model, endpoint, message, hub, tmp_path):
    done = ask(f"download({model!r})", endpoint or hub, tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("raydistill.errors.InputError: " + model)
    assert message.format(hub=hub) in last
    assert TOKEN not in done.stderr


NO_TOKEN = (
    "gated, and node {node} has no token. Accept its licence at {page}, and set HF_TOKEN on every node before Ray starts "
    "there; where nodes share HF_HOME, `hf auth login` on one of them will do"
)
OTHER_TOKEN = "gated, and the token of node {node} may not read it. Accept its licence at {page}, as the token's owner"


@pytest.mark.parametrize(("token", "message"), [({}, NO_TOKEN), ({"HF_TOKEN": "hf_other"}, OTHER_TOKEN)])
def test_a_driver_with_a_token_and_a_node_without_one_that_may_read_a_gated_model(token, message, hub, tmp_path):
    driver = ask("print(download('org/gated'))", hub, tmp_path / "driver", HF_TOKEN=TOKEN)
    assert driver.returncode == 0, driver.stderr
    folder = driver.stdout.strip().replace(str(tmp_path / "driver"), "/elsewhere")
    done = ask(
        f"from raydistill.storage.staging import on_this_machine; on_this_machine({folder!r})",
        hub,
        tmp_path / "node",
        **token,
    )
    message = message.format(node=socket.gethostname(), page=f"{hub}/org/gated")
    assert done.stderr.strip().splitlines()[-1] == f"raydistill.errors.InputError: org/gated@{SHA}: {message}"
    assert "hf_other" not in done.stderr


def test_a_node_with_a_disk_of_its_own_fetches_a_model_once_for_all_its_processes(hub, tmp_path):
    driver = ask("print(download('org/kolors'))", hub, tmp_path / "driver").stdout.strip()
    sizes = len(Hub.seen)
    # as the driver names the folder to a rank on another node, whose cache is elsewhere and empty
    code = f"from raydistill.storage.staging import on_this_machine; print(on_this_machine({driver!r} + '/unet/config.json'))"
    with ThreadPoolExecutor(3) as pool:
        there = list(
            pool.map(
                lambda _: ask(code.replace(str(tmp_path / "driver"), "/elsewhere"), hub, tmp_path / "node"), range(3)
            )
        )
    assert {done.returncode for done in there} == {0}, there[0].stderr
    (file,) = {Path(done.stdout.strip()) for done in there}
    assert file == tmp_path / "node" / Path(driver).relative_to(tmp_path / "driver") / "unet" / "config.json"
    assert file.read_bytes() == b"{}"
    paths = [path for path, _ in Hub.seen[sizes:] if "/resolve/" in path and path.endswith("/unet/config.json")]
    assert len(paths) <= 2, "its head and the file, once"
    Hub.seen.clear()
    assert ask(f"print(resolve('org/kolors@{SHA}'))", hub, tmp_path / "node").returncode == 0
    assert Hub.seen == []


def test_one_file_of_a_repository_is_fetched_alone_and_keeps_its_commit(hub, tmp_path):
    name = "org/kolors/one_file_with_everything.safetensors"
    code = "from raydistill.storage.hub import pinned_file\nfrom raydistill.storage.resolve import resolve_file\n"
    code += f"pinned = pinned_file({name!r}); print(pinned, resolve_file(pinned))"
    first = ask(code, hub, tmp_path)
    assert first.returncode == 0, first.stderr
    pinned, file = first.stdout.split()
    assert pinned == f"org/kolors@{SHA}/one_file_with_everything.safetensors"
    assert Path(file).read_bytes() == FILES["one_file_with_everything.safetensors"]
    assert [path.name for path in Path(file).parent.iterdir()] == ["one_file_with_everything.safetensors"]
    Hub.main = LATER
    Hub.seen.clear()
    worker = f"from raydistill.storage.resolve import resolve_file\nprint(resolve_file({pinned!r}))"
    assert ask(worker, hub, tmp_path).stdout.strip() == file
    assert [path for path, _ in Hub.seen if "kolors" in path] == []
    lacking = ask("from raydistill.storage.hub import fetch_file\nfetch_file('org/kolors')", hub, tmp_path)
    assert (
        lacking.stderr.strip()
        .splitlines()[-1]
        .endswith(
            "InputError: org/kolors: the repository has no pytorch_lora_weights.safetensors; name one, as org/name/file.safetensors"
        )
    )


def test_a_revision_that_is_left_open_is_that_of_the_same_file_alone():
    assert same_but_for_revision("org/a/f.safetensors", f"org/a@{SHA}/f.safetensors")
    assert same_but_for_revision("org/a", f"org/a@{SHA}")
    assert not same_but_for_revision("org/a/g.safetensors", f"org/a@{SHA}/f.safetensors")
    assert not same_but_for_revision(f"org/a@{LATER}/f.safetensors", f"org/a@{SHA}/f.safetensors")
    assert not is_hub_file("org/a/../f.safetensors")


def test_a_copy_that_was_left_half_fetched_is_completed(hub, tmp_path):
    folder = Path(ask("print(download('org/kolors'))", hub, tmp_path).stdout.strip())
    (tmp_path / "hub" / ".raydistill" / "org--kolors").unlink()  # it was killed before the end
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    done = ask("print(resolve('org/kolors'))", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("text", ["org/name", "black-forest-labs/FLUX.2-klein-base-4B", "org/name@v1.0"])
def test_hub_ids(text):
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["name", "/org/name", "./org/name", "~/org/name", "org/name/more", "org/na me", "org/"]
)
def test_what_is_no_hub_id(text):
    assert not is_hub_id(text)
    with pytest.raises(InputError, match="not a model of the hub"):
        download(text)


def test_a_folder_goes_before_a_hub_model_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")


def test_only_models_may_come_from_the_hub():
    config = load(overrides=["prompts.path=org/prompts"])
    with pytest.raises(InputError, match="prompts.path: org/prompts does not exist"):
        check_paths(config, ["prompts.path"])


PIN = """
from raydistill.config.reading import load
from raydistill.driver.run_folder import create_run_folder, open_run_folder, pin_models
config = load(None, ["storage={storage}", "run.name={name}", "teacher.model={model}"])
run = open_run_folder(config)
config = pin_models(config, run)
create_run_folder(run, config)
print(config.teacher.model)
"""


def test_a_run_keeps_the_commits_of_its_models_when_they_are_published_anew(hub, tmp_path):
    def pin(name: str, model: str = "org/kolors") -> subprocess.CompletedProcess[str]:
        return ask(PIN.format(storage=tmp_path / "runs", name=name, model=model), hub, tmp_path)

    assert pin("old").stdout.strip() == f"org/kolors@{SHA}"
    Hub.main = LATER
    assert pin("new").stdout.strip() == f"org/kolors@{LATER}"
    assert pin("old").stdout.strip() == f"org/kolors@{SHA}"  # a resume
    assert pin("old", f"org/kolors@{SHA}").stdout.strip() == f"org/kolors@{SHA}"
    other = pin("old", "org/kolors@main")
    assert other.returncode != 0
    assert "teacher.model: 'org/kolors@" in other.stderr
    for _ in range(2):
        assert pin("named", "org/kolors@main").stdout.strip() == "org/kolors@main"
    lost = pin("lost", "org/nothing")
    assert "InputError: teacher.model: org/nothing: neither a folder here nor a model of the hub" in lost.stderr
