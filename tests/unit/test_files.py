"""Small files of a run: whole at every moment, and named when something else has damaged them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raydistill.config.reading import load
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.storage.atomic import _temporary, read_json, replace_text, replacing, scratch
from raydistill.storage.fingerprint import content_hash
from raydistill.workers.stage import Stage


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    replace_text(file, "{}")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(file, '{"steps": 1}')
    assert file.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "runs" / "export"
    for number in (1, 2):
        with replacing(folder) as fresh:
            fresh.mkdir()
            (fresh / f"weights-{number}").write_text("whole")
            assert folder.exists() == (number == 2), "the old one stays until the new one is whole"
    assert [file.name for file in folder.iterdir()] == ["weights-2"]

    def fail(write):
        with replacing(folder) as fresh:
            write(fresh)
            raise KeyboardInterrupt

    for write in (Path.mkdir, Path.touch, lambda _: None):
        with pytest.raises(KeyboardInterrupt):
            fail(write)
    with pytest.raises(FileNotFoundError), replacing(folder):
        pass  # nothing was written
    assert [file.name for file in folder.iterdir()] == ["weights-2"]
    assert list(folder.parent.iterdir()) == [folder]


def test_what_a_killed_writer_left_is_used_up_where_there_is_one_writer(tmp_path):
    code = (
        "import os, sys; from raydistill.storage.atomic import replacing; from pathlib import Path\n"
        "with replacing(Path(sys.argv[1]), alone=True) as fresh:\n"
        "    exec(sys.argv[2]); os._exit(9)"
    )
    for name, write in (("file", "fresh.write_text('half')"), ("folder", "fresh.mkdir(); (fresh / 'half').touch()")):
        assert subprocess.run([sys.executable, "-c", code, name, write], cwd=tmp_path).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(tmp_path / "file", alone=True) as fresh:
        fresh.write_text("1")
    with replacing(tmp_path / "folder", alone=True) as fresh:
        fresh.mkdir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_others_may_read_what_is_written_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        replace_text(tmp_path / "file", "")
        with replacing(tmp_path / "tensors") as fresh:
            save_file({"x": torch.zeros(1)}, fresh)
        with replacing(tmp_path / "folder") as fresh:
            fresh.mkdir(mode=0o700)  # as tempfile makes them
            (fresh / "inside").mkdir(mode=0o700)
            save_file({"x": torch.zeros(1)}, fresh / "inside" / "tensors")
            (fresh / "link").symlink_to("inside")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == dict.fromkeys(("file", "tensors", "folder/inside/tensors"), 0o640) | dict.fromkeys(
        ("folder", "folder/inside", "folder/link"), 0o750
    )


def test_writing_files_needs_nothing_but_the_standard_library():
    """The environments of the reward packages have other versions of all the rest, or none."""
    code = (
        "import sys; before = set(sys.modules); import raydistill.storage.atomic\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["raydistill"], done.stderr


def test_a_content_hash_sees_names_and_bytes_also_behind_links(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_text("a")
    model = tmp_path / "model"
    model.mkdir()
    (model / "vae").symlink_to(tmp_path / "vae")
    seen = [content_hash(model)]
    (tmp_path / "vae" / "weights").write_text("b")
    seen.append(content_hash(model))
    (tmp_path / "vae" / "weights").rename(tmp_path / "vae" / "others")
    seen += [content_hash(model), content_hash(tmp_path / "vae" / "others")]
    assert len({*seen[:3]}) == 3
    assert seen[2] == seen[3], "of the only file"


@pytest.mark.parametrize("text", ["", '{"steps": 1', "\x00\x00"])
def test_a_damaged_file_is_named_with_its_cure(tmp_path, text):
    file = tmp_path / "teacher.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"^{file} is damaged .*: remove it$"):
        read_json(file, "remove it")
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match="result.json is damaged .*: remove it, and the stage ends again"):
        Stage(name="distill", config={}, folder=str(tmp_path), mlflow_uri="", mlflow_run="").result()


def test_a_run_whose_files_were_cut_says_so(tmp_path):
    config = load(overrides=[f"storage={tmp_path}", "run.name=mine"])
    run = open_run_folder(config)
    create_run_folder(run, config)
    saved = run.path / "config.yaml"
    text, written = saved.read_text(), saved.stat().st_mtime_ns
    create_run_folder(run, config)
    assert saved.stat().st_mtime_ns == written, "it says the same, so it is left alone"
    middle = text.index("student:") + 5
    for cut in ("", text[:middle], text[: text.index("steps:") + 7] + "'"):
        saved.write_text(cut)
        with pytest.raises(InputError, match=rf"{saved} is damaged.*restore it, or use another run\.name"):
            open_run_folder(config)
    saved.write_text(text)
    assert open_run_folder(config) == run
    run.remember(mlflow={"pipeline": "1"})
    assert run.recall() == {"mlflow": {"pipeline": "1"}}
    (run.path / "run.json").write_text("")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        run.recall()


def test_what_a_killed_process_left_in_its_scratch_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os; from pathlib import Path; from raydistill.storage.atomic import scratch\n"
        "with scratch(Path('/runs/one')) as folder: (folder / 'state.pt').write_text('half'); os._exit(9)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    (left,) = tmp_path.iterdir()
    with scratch(Path("/runs/one")) as folder:
        assert folder == left
        assert list(folder.iterdir()) == []
        with scratch(Path("/runs/two")) as other:
            assert other != folder
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_killed_process_goes_with_the_next_one_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = (
        "import os; from raydistill.storage.atomic import _temporary\n"
        "with _temporary() as folder: (folder / 'state.pt').write_text('10 GB'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert (left / "state.pt").exists()
    with _temporary() as own:
        assert list(tmp_path.iterdir()) == [own]
        with _temporary() as other:
            assert {own, other} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_above_is_followed_no_further(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_bytes(b"1")
    before = content_hash(tmp_path)
    (tmp_path / "part" / "above").symlink_to(tmp_path)
    assert content_hash(tmp_path) == before
