"""The command `raydistill`, its help, and what it suggests for what was mistyped."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
from test_config import assert_resumes

from raydistill.commands import COMMANDS, main
from raydistill.commands.distill import JOB
from raydistill.config.command_line import from_command_line
from raydistill.config.key_help import COMMON, help_text
from raydistill.config.reading import CONFIGS, fields, find_config, load, shipped
from raydistill.driver.finished import additions, reopen
from raydistill.driver.job import run_job
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.storage.resolve import check_paths


def test_every_script_of_jobs_is_a_command_and_the_other_way_round():
    scripts = {file.stem.replace("_", "-") for file in (CONFIGS.parent / "jobs").glob("*.py")}
    assert scripts == set(COMMANDS)
    for name in COMMANDS:
        assert callable(importlib.import_module(f"raydistill.commands.{name.replace('-', '_')}").main)


def test_commands_are_listed_and_a_mistyped_one_is_corrected(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in listed] == []
    assert main(["train_bridg"]) == 2
    assert "did you mean train-bridge?" in capsys.readouterr().err
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert re.fullmatch(r"raydistill \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["distill", "evaluate", "sample", "train-bridge"])
def test_the_usage_names_what_was_typed(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/raydistill"])
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: raydistill {name} ")


# -- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_is_wrapped_and_begins_with_the_common_keys(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text("One line.\n\nAnother, " + "long " * 40, "raydistill distill", load())
    assert max(map(len, text.splitlines())) <= columns
    order = [match[1] for match in re.finditer(r"^  ([a-z0-9_.]+)(?: \(|$)", text, re.MULTILINE)]
    assert tuple(order[:10]) == COMMON
    assert sorted(order) == sorted(key for key, *_ in fields())
    sections = [key.partition(".")[0] for key in order[10:]]
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)  # each in one piece


@pytest.mark.parametrize(
    ("topic", "shown"),
    [
        ("vsd", ["vsd.weight", "vsd.t_min", "vsd.t_max", "vsd.guidance_rescale", "vsd.shift"]),
        ("teacher.model", ["teacher.model"]),
    ],
)
def test_help_of_a_section_or_a_key(topic, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        from_command_line("Purpose.", ["--help", topic])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  ([a-z0-9_.]+)(?: \(|$)", text, re.MULTILINE) == shown
    assert "Purpose" not in text


def test_help_shows_overrides_and_corrects_a_section(capsys):
    with pytest.raises(SystemExit):
        from_command_line("Purpose.", ["--help", "student.lr=3e-3"])
    assert "student.lr (float) = 0.003" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        from_command_line("Purpose.", ["--help", "studnet"])
    assert stopped.value.code == 2
    assert "did you mean student?" in capsys.readouterr().err


def test_the_dashboard_is_an_option_of_the_commands_that_start_a_run_alone(capsys, monkeypatch):
    for command, code in (("distill", 0), ("synthesize", 0), ("train_bridge", 0), ("plan", 2)):
        monkeypatch.setattr(sys, "argv", [f"jobs/{command}.py", "--dashboard", "--print-config"])
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"raydistill.commands.{command}").main()
        assert stopped.value.code == code
    assert "unknown option --dashboard" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_job("Purpose.", JOB, ["--dashbord"])
    assert "options are --config, --help, --print-config, --dashboard" in capsys.readouterr().err


# -- what is suggested and taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lr=1e-5", "did you mean student.lr, bridge.lr, fake_score.lr or discriminator.lr?"),
        ("teacher.steps=3", "did you mean student.steps, bridge.steps or distill.steps?"),
        ("sampling_steps=3", "did you mean teacher.sampling_steps or synthesis.sampling_steps?"),
        ("samplingsteps=3", "did you mean teacher.sampling_steps or synthesis.sampling_steps?"),
        ("studnet.lr=1", "unknown key studnet; did you mean student?"),
    ],
)
def test_the_last_part_of_a_key_is_enough_for_a_suggestion(override, suggestion):
    with pytest.raises(InputError) as error:
        load(overrides=[override])
    assert suggestion in str(error.value)


def test_lists_need_no_brackets(tmp_path):
    (tmp_path / "mine.yaml").write_text("controls: no_vsd\n")
    assert load(overrides=["controls=no_vsd"]).controls == ["no_vsd"]
    assert load(overrides=["controls=no_vsd, shared_space"]).controls == ["no_vsd", "shared_space"]
    assert load(overrides=["bridge.depths=2,4"]).bridge.depths == [2, 4]
    assert load(overrides=["bridge.depths=6"]).bridge.depths == [6]
    assert load(tmp_path / "mine.yaml").controls == ["no_vsd"]
    with pytest.raises(InputError, match=r"controls\.1: .*'shared_space' \(got 'x'\)"):
        load(overrides=["controls=no_vsd,x"])
    with pytest.raises(InputError, match=r"bridge\.depths\.0: .*greater than or equal to 1"):
        load(overrides=["bridge.depths=0"])


def test_every_path_that_is_wrong_is_named_at_once(tmp_path):
    job_paths = ["student.unet", "bridge.pairs", "prompts.path"]
    config = load(overrides=[f"{key}={tmp_path / 'no' / key}" for key in job_paths] + ["teacher.model=org/absent"])
    with pytest.raises(InputError) as error:
        check_paths(config, ["teacher.model", "evaluation.prompts", *job_paths])
    lines = str(error.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == job_paths  # before the hub is asked


# -- configurations by name -------------------------------------------------------------------------------


def test_shipped_configurations_go_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped():
        assert load(name) == load(CONFIGS / f"{name}.yaml")
    assert find_config("teachers/sdxl.yaml") == CONFIGS / "teachers" / "sdxl.yaml"
    (tmp_path / "mine.yaml").write_text("extends: [paper, teachers/sdxl]\nstudent: {lr: 0.5}\n")
    config = load("mine.yaml")
    assert (config.teacher.model, config.student.lr) == ("stabilityai/stable-diffusion-xl-base-1.0", 0.5)
    assert "kuberay" not in shipped()


def test_a_file_comes_before_a_shipped_configuration_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()  # a folder is no configuration
    assert load("shapes") == load()
    (tmp_path / "shapes.yaml").write_text("student: {lr: 0.5}\n")
    assert load("shapes.yaml").student.lr == 0.5
    with pytest.raises(InputError, match="sd35_medium_sd51: no such file.*did you mean sd35_medium_sd15"):
        load("sd35_medium_sd51")
    (tmp_path / "mine.yaml").write_text("extends: paepr\n")
    with pytest.raises(InputError, match="mine.yaml: extends .*paepr, which does not exist"):
        load("mine.yaml")


# -- finished runs ----------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, run_script):
    """`finished(*overrides)` -> what `distill` says of a run of 60 updates that is finished."""
    common = [f"storage={tmp_path}", "run.name=mine", "controls=[]"]
    assert_resumes(tmp_path, ["controls=[]", "distill.steps=60"], [f"storage={tmp_path}/"])
    (tmp_path / "mine" / "summary.json").write_text('{"steps": 60}')
    return lambda *overrides: run_script("distill", *common, *overrides)


def test_a_finished_run_says_what_to_do_for_a_changed_key(finished, tmp_path):
    file = tmp_path / "mine" / "summary.json"
    code, output, error = finished("distill.steps=60")
    assert (code, output.partition(" ")[2], error) == (0, f"run mine is finished: {file}\n", "")
    code, _, error = finished("distill.steps=60", "student.lr=0.5")
    assert code == 2
    assert "run.name=mine is finished with other settings" in error
    assert "student.lr: 0.0002 -> 0.5" in error
    assert "Use another run.name" in error
    assert "a larger distill.steps alone would extend it" in error
    code, _, error = finished("distill.steps=30")
    assert code == 2
    assert "is finished after 60 updates, and distill.steps=30 asks for fewer: use another run.name" in error
    code, output, _ = finished("distill.steps=60", "evaluation.grid=4")
    assert code == 0
    assert "not used by a finished run: evaluation.grid 32 -> 4 (use another run.name)" in output
    file.write_text('{"steps": 40, "stopped": {"distill": "step 40: drift"}}')
    code, _, error = finished("distill.steps=90")
    assert code == 2
    assert "was ended early (step 40: drift), so distill.steps=90 does not extend it: set distill.stop_on_plat" in error


def test_a_run_that_was_ended_early_goes_on_where_that_is_to_end_it_no_longer(tmp_path):
    given = [f"storage={tmp_path}", "run.name=mine", "distill.steps=60"]
    asked = {"stop_on_plateau": ("4", "null", "6", "3"), "stop_on_collapse": ("true", "false", "false", "true")}
    for key, (before, *looser, same) in asked.items():
        config = load(overrides=[*given, f"distill.{key}={before}"])
        run = open_run_folder(config)
        create_run_folder(run, config)
        (run.path / "distill").mkdir(exist_ok=True)
        (run.path / "distill" / "result.json").write_text('{"steps": 40}')
        for told in ({}, {"distill": "step 40: it rises no longer"}):
            (run.path / "summary.json").write_text(json.dumps({"steps": 40, "stopped": told}))
            assert additions(run, config) == []
            assert additions(run, load(overrides=[*given, f"distill.{key}={same}"])) == []
            for value in looser:
                found = additions(run, load(overrides=[*given, f"distill.{key}={value}"]))
                assert len(found) == bool(told)
                assert all(one.startswith(f"distill.{key} ") for one in found)
        reopen(run, load(overrides=[*given, f"distill.{key}={looser[0]}"]))
        assert not (run.path / "distill" / "result.json").exists()
