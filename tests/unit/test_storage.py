"""Inputs and outputs by URI, against a server on this machine that speaks S3."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pair_sets import write_upscaled

from raydistill.bridge import objective
from raydistill.bridge.objective import build_objective
from raydistill.config.reading import load, to_yaml
from raydistill.config.schema import Config
from raydistill.data.images import open_images
from raydistill.data.pairs import PairSet, fingerprint, write_pairs
from raydistill.data.prompts import read_prompts
from raydistill.driver import binding, preflight
from raydistill.driver.stages import make_pairs_alone
from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder
from raydistill.storage import place as place_module
from raydistill.storage import staging
from raydistill.storage.atomic import reading, replace_text, writing
from raydistill.storage.place import Remote, remote
from raydistill.storage.resolve import check_paths, local_path, resolve, to_place
from raydistill.storage.staging import on_this_machine
from raydistill.workers import bridge


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
    assert PairSet(resolve(f"{folder}/samples/flux")).prompts() == PairSet(WEIGHTS / "samples/flux").prompts()
    for name in ("bridge/sd15-flux", "sd15"):
        staged = resolve(f"{folder}/{name}")
        assert staged.name == Path(name).name  # which is part of what Bridges and pairs say of their models
        files = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
        assert len(files) > 1
        assert all((staged / file).read_bytes() == (WEIGHTS / name / file).read_bytes() for file in files)
    space = load_space(resolve(f"{folder}/sd15"), "StableDiffusionPipeline")
    check_folder(space)


def test_the_pairs_of_a_bridge_are_read_where_they_lie(folder, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_check_tracking", lambda _: None)  # making a store takes seconds
    (folder / "pairs").upload(write_upscaled(tmp_path / "pairs"))
    config = load(overrides=[f"storage={tmp_path}", "bridge.checkpoint=null", f"bridge.pairs={folder}/pairs"])
    inputs = preflight.check_inputs(config)
    assert binding._fingerprints(config, inputs)["bridge.pairs"] == fingerprint(tmp_path / "pairs")
    named = make_pairs_alone(SimpleNamespace(config=config))
    bridge._check(config, named)
    here, there = (build_objective(config, place).batch(3) for place in (tmp_path / "pairs", named))
    assert here.prompts == there.prompts
    assert torch.equal(here.z_teacher, there.z_teacher)
    assert not (cache / "staged").exists(), "a node has copied the whole set"
    with pytest.raises(InputError, match=r"^bridge\.pairs: s3://.*/nowhere: no pairs-"):
        preflight._open_pairs(load(overrides=[f"bridge.pairs={folder}/nowhere"]), "bridge.pairs", inputs.teacher)


@pytest.mark.full
def test_a_set_that_is_read_many_times_is_copied_where_there_is_room(folder, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "PairSet", partial(PairSet, cached_shards=1))
    for shard in range(2):
        latents = {"z_teacher": torch.zeros(2, 8, 16, 16), "z_student": torch.zeros(2, 4, 8, 8)}
        columns = {"prompts": [f"{shard} a", f"{shard} b"], "prompt_ids": [2 * shard, 2 * shard + 1], "seeds": [0, 0]}
        write_pairs(tmp_path / "pairs", shard, **columns, **latents)
    (folder / "pairs").upload(tmp_path / "pairs")

    def read_from(steps):
        config = load(overrides=["bridge.checkpoint=null", "bridge.batch_size=2", f"bridge.steps={steps}"])
        return build_objective(config, f"{folder}/pairs").pairs.folder

    assert read_from(4) == folder / "pairs"
    assert not (cache / "staged").exists()
    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert read_from(5) == folder / "pairs"
    assert (cache / "staged") in read_from(5).parents


def test_several_processes_fetch_once(folder, cache, tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for index in range(4):
        (source / f"pairs-{index:05d}.parquet").write_bytes(os.urandom(1 << 20))
    (folder / "set").upload(source)
    code = (
        "import sys\n"
        "from raydistill.storage.place import Remote\n"
        "from raydistill.storage.staging import fetch\n"
        "download = Remote.download\n"
        "def told(self, target):\n"
        "    print('fetched', flush=True)\n"
        "    download(self, target)\n"
        "Remote.download = told\n"
        "print(fetch(sys.argv[1]))\n"
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
    digest = staging._digest(folder / "prompts.txt", entries)
    cut = cache / "staged" / f".new.{digest}" / "s3" / (folder / "prompts.txt").key
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
    with pytest.raises(InputError, match=f"{folder}/sd15: has changed since"):
        on_this_machine(path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{folder}/none.txt", "no such object, and none below it"),
        ("s3://no-such-bucket-here/prompts.txt", "no such object, and none below it"),
        ("hdfs://host/prompts.txt", "unknown scheme hdfs://; use s3://, gs://, hf://, file:// or a path"),
        ("s3://", "not a bucket and a key"),
        ("s3://bucket/a/../b", "not a bucket and a key"),
        ("s3://AKIAUSER:pa55word@bucket/x", "credentials and options do not belong in a URI"),
        ("s3://AKIAUSER:pa55/word@bucket/x", "credentials and options do not belong in a URI"),
        ("s3://bucket/x?secret_key=pa55word", "credentials and options do not belong in a URI"),
        ("file:///no/such/prompts.txt", "does not exist (looked at /no/such/prompts.txt)"),
    ],
)
def test_a_wrong_uri_is_named_with_key_and_cause_and_without_secrets(uri, message, folder):
    config = load(None, [f"prompts.path={uri.format(folder=folder)}"])
    with pytest.raises(InputError) as error:
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
        with pytest.raises(InputError, match="prompts.path: s3://.*AWS_ACCESS_KEY_ID.*, or the machine's role"):
            check_paths(load(None, [f"prompts.path={folder}/prompts.txt"]), ["prompts.path"])
        server.shutdown()


def test_a_store_that_is_away_is_no_wrong_input(folder, monkeypatch):
    monkeypatch.setattr(place_module, "RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be read: When .*Could not connect"):  # without advice on credentials
        resolve(f"{folder}/access/token.txt")


def test_file_uris_are_paths(tmp_path):
    (tmp_path / "my prompts.txt").touch()
    assert local_path(f"file://{tmp_path}/my%20prompts.txt") == tmp_path / "my prompts.txt"
    assert to_place(f"file://{tmp_path}") == tmp_path
    assert isinstance(to_place("s3://bucket/runs/"), Remote)
    assert str(to_place("s3://bucket/runs/")) == "s3://bucket/runs"
    assert to_place("outputs") == Path("outputs")


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


# -- exports ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(bucket, tmp_path_factory):
    """`s3://…/runs` with a run `mine` that has an export, made from the shipped one-step start."""
    from raydistill.export.pipeline import ModelCard, export_student
    from raydistill.spaces.published_students import load_student

    space = load_space(WEIGHTS / "sd15")
    local = tmp_path_factory.mktemp("run")
    card = ModelCard(
        teacher="shapes:flux",
        teacher_class="FluxPipeline",
        student="shapes:sd15-onestep",
        steps=1,
        run_id="0" * 32,
        config_hash="0" * 12,
        metrics={"mean": 0.5},
    )
    export_student(space, load_student(space, WEIGHTS / "sd15-onestep"), 999, local / "export", card)
    (local / "config.yaml").write_text(to_yaml(Config()))
    (local / "run.json").write_text(json.dumps({"mlflow": {"pipeline": "a" * 32, "no_vsd": "b" * 32}}))
    runs = remote(f"{bucket}/runs")
    (runs / "mine").upload(local)
    (runs / "mine" / "no_vsd" / "export").upload(local / "export")
    return runs


def test_an_export_is_found_by_its_uri_its_runs_and_its_name_in_storage_by_uri(exported, cache):
    from raydistill.errors import InputError
    from raydistill.export.source import find_export, open_one_step

    for text, storage_ in (
        (f"{exported}/mine/export", Path("outputs")),
        (f"{exported}/mine", Path("outputs")),
        ("mine", exported),
        ("a" * 32, exported),
    ):
        export = find_export(text, storage_)
        assert (export.name, export.run) == ("mine", exported / "mine")
        assert export.run_config() == Config()
        assert open_one_step(export)[1] == 999
    assert find_export("b" * 32, exported).name == "mine/no_vsd"
    assert len([place_ for place_ in (cache / "staged").iterdir() if place_.is_dir() and place_.name[0] != "."]) == 2
    with pytest.raises(InputError, match="no such folder, and no run of that name in s3://"):
        find_export("yours", exported)
    with pytest.raises(InputError, match="name --tracking-uri"):
        find_export("c" * 32, exported)


def test_sample_draws_with_a_student_in_a_bucket(exported, tmp_path, run_script):
    prompts = exported.parent / "prompts.txt"
    prompts.write_text("a small red circle at the left on a white background\n")
    common = ("--prompts", prompts, "--storage", exported, "--device", "cpu")
    code, _, errors = run_script("sample", "mine", *common)
    assert (code, "name it with --out" in errors) == (2, True)
    code, _, errors = run_script("sample", "mine", *common, "--out", exported / "pictures")
    assert (code, "must be a folder of this machine" in errors) == (2, True)
    code, out, errors = run_script("sample", f"{exported}/mine", *common, "--out", tmp_path / "pictures")
    assert code == 0, errors
    assert (tmp_path / "pictures" / "grid.png").is_file()


def test_merge_writes_to_a_bucket_what_it_writes_to_a_folder(exported, tmp_path, run_script):
    students = (f"{exported}/mine", f"{exported}/mine/no_vsd/export")
    for out in (tmp_path / "merged", exported.parent / "merged"):
        code, _, errors = run_script("merge", *students, "--weights", 1, 3, "--out", out)
        assert code == 0, errors
    code, _, errors = run_script("merge", *students, "--out", exported.parent / "merged")
    assert (code, "exists already" in errors) == (2, True)
    there = resolve(f"{exported.parent}/merged")
    names = sorted(f.relative_to(there) for f in there.rglob("*") if f.is_file())
    assert names == sorted(f.relative_to(tmp_path / "merged") for f in (tmp_path / "merged").rglob("*") if f.is_file())
    assert all((there / f).read_bytes() == (tmp_path / "merged" / f).read_bytes() for f in names)


def test_evaluate_finds_a_student_in_a_bucket_and_says_what_it_needs_beside_it(exported, tmp_path, run_script):
    from raydistill.evaluation.subject import find_subject

    subject = find_subject("mine", exported)
    assert (subject.name, subject.start_timestep, subject.run_id) == ("mine", 999, "a" * 32)
    code, _, errors = run_script("evaluate", "mine", "--storage", exported)
    assert (code, "name it with --out" in errors) == (2, True), errors
    code, _, errors = run_script("evaluate", "mine", "--storage", exported, "--out", tmp_path / "out")
    assert (code, "--tracking-uri or MLFLOW_TRACKING_URI to an MLflow server" in errors) == (2, True), errors
