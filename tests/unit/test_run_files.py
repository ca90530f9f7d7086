"""run.json and config.yaml of a run whose student is used: damaged ones are named, and other runs are left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raydistill.errors import InputError
from raydistill.evaluation.subject import find_subject
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import find_export
from raydistill.spaces import load_space
from raydistill.storage.run_files import config_of, notes_of, tracking_uri_of

RUN, STAGE = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def export(sd_folder, tmp_path_factory) -> Path:
    space = load_space(sd_folder)
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student="shapes:sd15", steps=1)
    return export_student(space, space.load_network(), 999, tmp_path_factory.mktemp("run") / "export", card)


@pytest.fixture
def run(export, tmp_path) -> Path:
    """A finished run in the storage `tmp_path`."""
    shutil.copytree(export, tmp_path / "mine" / "export")
    (tmp_path / "mine" / "run.json").write_text(json.dumps({"mlflow": {"pipeline": RUN, "distill": STAGE}}))
    (tmp_path / "mine" / "config.yaml").write_text("run: {name: mine}\ntracking: {uri: http://server:5000}\n")
    return tmp_path / "mine"


NOTES = [b"[]", b"7", b"null", b"", b"\xff", b"{", b'{"mlflow": []}', b'{"mlflow": {"pipeline": 7}}', b"[" * 100_000]
CONFIGURATIONS = [
    b"[]", b"5", b"", b"text", b"\xff", b"a: b: c", b"a: &a [*a]", b"tracking: 5", b"tracking: [1]",
    b"tracking: {uri: 5}", b"\0",
]  # fmt: skip


@pytest.mark.parametrize("content", NOTES, ids=lambda content: str(content[:30]))
def test_a_damaged_run_json_of_the_model_is_one_line(run, content):
    assert find_subject("mine", run.parent).run_id == RUN
    (run / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^{run / 'run.json'} is damaged .*: restore it, or copy the export") as error:
        find_subject("mine", run.parent)
    assert "\n" not in str(error.value)
    assert find_export("mine", run.parent).folder == run / "export", "which needs no run.json"


@pytest.mark.parametrize("content", CONFIGURATIONS, ids=str)
def test_a_damaged_config_yaml_of_the_model_is_one_line(run, content):
    assert find_subject("mine", run.parent).tracking_uri == "http://server:5000"
    (run / "config.yaml").write_bytes(content)
    found = find_export("mine", run.parent)
    for use in (lambda: find_subject("mine", run.parent), found.run_config):
        with pytest.raises(InputError, match=f"^{run / 'config.yaml'} is damaged, or of another version") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_configuration_of_another_version_still_says_where_its_run_was_logged(run):
    (run / "config.yaml").write_text("unknown: {key: 1}\ntracking: {uri: http://server:5000, another: 2}\n")
    assert find_subject("mine", run.parent).tracking_uri == "http://server:5000"
    with pytest.raises(InputError, match=r"config.yaml is damaged, or of another version \(.*unknown key unknown"):
        find_export("mine", run.parent).run_config()


def test_a_run_without_these_files_has_no_notes_and_no_configuration(tmp_path):
    assert notes_of(tmp_path, "") == {}
    assert config_of(tmp_path, "") is None
    assert tracking_uri_of(tmp_path, "") is None


@pytest.mark.parametrize("content", NOTES, ids=lambda content: str(content[:30]))
@pytest.mark.parametrize("known", [RUN, STAGE])
def test_a_run_id_is_found_beside_damaged_runs_which_are_named(run, content, known, capsys):
    (run.parent / "broken").mkdir()
    (run.parent / "broken" / "run.json").write_bytes(content)
    (run.parent / "folder" / "run.json").mkdir(parents=True)
    (run.parent / "dangling").mkdir()
    (run.parent / "dangling" / "run.json").symlink_to("nowhere")
    assert find_export(known, run.parent).folder == run / "export"
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{run.parent / 'broken' / 'run.json'} is damaged" in line
    assert line.endswith("this run is left out of the search")


def test_a_run_id_that_is_nowhere_is_one_line_also_beside_damaged_runs(run):
    (run / "run.json").write_bytes(b"[]")
    with pytest.raises(InputError, match=f"{RUN}: there is no MLflow store"):
        find_export(RUN, run.parent)
