"""Inputs and outputs by URI, against a server on this machine that speaks S3."""

import os
import pickle
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from raydistill import storage
from raydistill.config import Config, ConfigError, check_paths, load, local_path, resolve
from raydistill.data.images import open_images
from raydistill.data.pairs import read_pairs
from raydistill.data.prompts import read_prompts
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.storage import Remote, place, present, reading, remote, replace_text, writing


@pytest.fixture
def folder(bucket):
    """A prefix that no other test uses."""
    return remote(f"{bucket}/{uuid.uuid4().hex[:8]}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    found = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYDISTILL_CACHE", str(found))
    return found


def test_prompts_pairs_weights_and_models_are_read_by_uri(folder):
    for name in ("prompts.txt", "samples/flux", "bridge/sd15-flux", "sd15"):
        (folder / name).upload(WEIGHTS / name)
    rules = ("prompt", "skip", 2000)
    here, there = (read_prompts(resolve(f"{root}/prompts.txt"), *rules) for root in (WEIGHTS, folder))
    assert there.prompts == here.prompts
    assert (there.ids == here.ids).all()
    assert read_pairs(resolve(f"{folder}/samples/flux")).prompts() == read_pairs(WEIGHTS / "samples/flux").prompts()
    for name in ("bridge/sd15-flux", "sd15"):
        staged = resolve(f"{folder}/{name}")
        assert staged.name == Path(name).name  # which is part of what Bridges and pairs say of their models
        files = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
        assert len(files) > 1
        assert all((staged / file).read_bytes() == (WEIGHTS / name / file).read_bytes() for file in files)
    space = load_space(resolve(f"{folder}/sd15"), "StableDiffusionPipeline")
    space.check_files()


def test_several_processes_fetch_once(folder, cache, tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for index in range(4):
        (source / f"pairs-{index:05d}.parquet").write_bytes(os.urandom(1 << 20))
    (folder / "set").upload(source)
    code = (
        "import sys\n"
        "from raydistill import storage\n"
        "download = storage.Remote.download\n"
        "def told(self, target):\n"
        "    print('fetched', flush=True)\n"
        "    download(self, target)\n"
        "storage.Remote.download = told\n"
        "print(storage.stage(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, f"{folder}/set"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    lines = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(line.count("fetched") for line in lines) == 1
    (place_,) = {line[-1] for line in lines}
    assert sorted(f.name for f in Path(place_).iterdir()) == sorted(f.name for f in source.iterdir())
    assert not list((cache / "staged").glob(".*[!k]"))  # nothing unfinished; the locks stay


def test_an_object_that_changes_is_fetched_again(folder):
    (folder / "prompts.txt").write_text("one\n")
    first = resolve(f"{folder}/prompts.txt")
    assert resolve(f"{folder}/prompts.txt") == first
    (folder / "prompts.txt").write_text("one\ntwo\n")
    second = resolve(f"{folder}/prompts.txt")
    assert (first.read_text(), second.read_text()) == ("one\n", "one\ntwo\n")


def test_a_killed_fetch_leaves_nothing_that_counts(folder, cache):
    (folder / "prompts.txt").write_text("whole\n")
    entries = (folder / "prompts.txt").entries()
    digest = storage._digest(folder / "prompts.txt", entries)
    cut = cache / "staged" / f".{digest}" / "s3" / (folder / "prompts.txt").key
    cut.parent.mkdir(parents=True)
    cut.write_text("who")
    assert resolve(f"{folder}/prompts.txt").read_text() == "whole\n"


def test_what_one_node_has_staged_is_staged_on_another_one_in_the_same_version(folder, cache):
    """A Space and images travel in pickles; the other node is this one with an empty cache."""
    (folder / "sd15").upload(WEIGHTS / "sd15")
    for name in ("a.png", "b.png"):
        (folder / "images" / name).upload(next((WEIGHTS.parent / "pictures").glob("*.png")))
    space = load_space(resolve(f"{folder}/sd15"))
    images = open_images(resolve(f"{folder}/images"), "image", None)
    sent, path = pickle.dumps((space, images)), Path(space.folder)
    shutil.rmtree(cache / "staged")
    space, images = pickle.loads(sent)
    assert space.part_config("vae")["_class_name"] == "AutoencoderKL"
    assert images.picture(1, 32).shape == (3, 32, 32)
    shutil.rmtree(cache / "staged")
    assert load_space(str(path)).folder == str(path)
    shutil.rmtree(cache / "staged")
    (folder / "sd15" / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"{folder}/sd15: has changed since"):
        present(path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{folder}/none.txt", "no such object, and none below it"),
        ("s3://no-such-bucket-here/prompts.txt", "no such object, and none below it"),
        ("hdfs://host/prompts.txt", "unknown scheme hdfs://; use s3://, gs://, file:// or a path"),
        ("s3://", "not a bucket and a key"),
        ("s3://bucket/a/../b", "not a bucket and a key"),
        ("s3://AKIAUSER:pa55word@bucket/x", "credentials and options do not belong in a URI"),
        ("s3://bucket/x?secret_key=pa55word", "credentials and options do not belong in a URI"),
        ("file:///no/such/prompts.txt", "does not exist (looked at /no/such/prompts.txt)"),
    ],
)
def test_a_wrong_uri_is_named_with_key_and_cause_and_without_secrets(uri, message, folder):
    config = load(None, [f"prompts.path={uri.format(folder=folder)}"])
    with pytest.raises(ConfigError) as error:
        check_paths(config, ["prompts.path"])
    assert str(error.value).startswith("prompts.path: ")
    assert message in str(error.value)
    assert "pa55word" not in str(error.value)


def test_a_store_that_refuses_says_which_credentials_are_read(folder, monkeypatch):
    """The server's answer to a request without any valid key, given by another real server that knows only refusals."""
    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(ConfigError, match="prompts.path: s3://.*AWS_ACCESS_KEY_ID.*, or the machine's role"):
            check_paths(load(None, [f"prompts.path={folder}/prompts.txt"]), ["prompts.path"])
        server.shutdown()


def test_a_store_that_is_away_is_no_wrong_input(folder, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be read: .*Could not connect"):
        resolve(f"{folder}/prompts.txt")


def test_file_uris_are_paths(tmp_path):
    (tmp_path / "my prompts.txt").touch()
    assert local_path(f"file://{tmp_path}/my%20prompts.txt") == tmp_path / "my prompts.txt"
    assert place(f"file://{tmp_path}") == tmp_path
    assert isinstance(place("s3://bucket/runs/"), Remote)
    assert str(place("s3://bucket/runs/")) == "s3://bucket/runs"
    assert place("outputs") == Path("outputs")


def test_a_remote_place_means_what_a_path_means(folder):
    file = folder / "run" / "note.txt"
    assert not file.exists()
    assert folder.iterdir() == []
    replace_text(file, "zwölf")
    assert file.is_file()
    assert not (folder / "run").is_file()
    assert (folder / "run").exists()
    assert file.read_text() == "zwölf"
    assert (folder / "run").iterdir() == [file]
    assert (file.name, file.parent) == ("note.txt", folder / "run")
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    with pytest.raises(FileNotFoundError):
        file.read_text()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        Remote("s3", "no-such-bucket-here/x").write_text("")
    assert pickle.loads(pickle.dumps(file)) == file


def test_a_block_that_fails_stores_nothing(folder):
    def write():
        with writing(folder / "export") as local:
            local.mkdir()
            (local / "model_index.json").write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert not (folder / "export").exists()


def test_folders_go_there_and_back_with_their_descriptions_last(folder, monkeypatch):
    order = []
    import pyarrow.fs

    copy = pyarrow.fs.copy_files
    monkeypatch.setattr(pyarrow.fs, "copy_files", lambda *a, **k: (order.append(a[1]), copy(*a, **k)))
    with writing(folder / "export") as local:
        (local / "unet").mkdir(parents=True)
        for name in ("README.md", "model_index.json", "unet/config.json", "unet/weights.safetensors"):
            (local / name).write_text(name)
    assert order[-1].endswith("export/model_index.json")
    assert len(order) == 4
    with reading(folder / "export") as local:
        assert (local / "unet" / "weights.safetensors").read_text() == "unet/weights.safetensors"
    assert not local.exists()


def test_an_untouched_configuration_asks_no_store():
    for key in ("prompts.path", "evaluation.prompts", "bridge.checkpoint"):
        check_paths(Config(), [key])
