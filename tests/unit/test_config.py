"""The configuration tells whoever typed it what was wrong, before anything starts."""

import pytest
import yaml

from raydistill.config.command_line import from_command_line, shown_command
from raydistill.config.reading import (
    CONFIGS,
    changed,
    config_hash,
    fields,
    flatten,
    from_yaml,
    load,
    mathematical,
    to_yaml,
    validate,
)
from raydistill.config.schema import Config
from raydistill.config.stages import DistillConfig
from raydistill.driver.run_folder import open_run_folder
from raydistill.errors import InputError
from raydistill.storage.resolve import check_storage


def test_defaults_and_every_shipped_config_are_valid():
    assert validate({}) == Config()
    files = sorted(file for file in CONFIGS.glob("*.yaml") if file.name != "kuberay.yaml")
    assert files
    for file in files:
        load(file)


def test_every_key_is_documented():
    assert [key for key, field, _ in fields() if not field.description] == []


def test_overrides_reach_their_key_and_scientific_notation_is_a_number():
    config = load(overrides=["student.lr=1e-5", "run.name=mine", "student.ema_decay=null", "bridge.depths=[2, 2]"])
    assert (config.student.lr, config.run.name, config.student.ema_decay) == (1e-5, "mine", None)
    assert config.bridge.depths == [2, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnet.lr=1e-5", "unknown key studnet; did you mean student"),
        ("teachers.shard=2", "did you mean teachers.shards"),
        ("distill.steps=abc", "distill.steps: .*integer"),
        ("vsd.t_min=3", "vsd.t_min: .*less than or equal to 1"),
        ("student.lr=-1", "student.lr: .*greater than 0"),
        ("student.lr=.inf", "student.lr"),
        ("fake_score.kind=lore", "fake_score.kind: .*'lora'"),
        ("run.name=../../etc", "run.name"),
        ("just-a-word", "section.key=value"),
        ("vsd=3", "vsd"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(InputError, match=message):
        load(overrides=[override])


def test_every_mistake_is_reported_at_once():
    with pytest.raises(InputError) as error:
        load(overrides=["teachers.shard=2", "distill.steps=0"])
    assert len(str(error.value).splitlines()) == 2


def test_reversed_time_range_and_nothing_to_learn_from_are_refused():
    with pytest.raises(InputError, match="t_min .* must be below t_max"):
        load(overrides=["vsd.t_min=0.9", "vsd.t_max=0.1"])
    with pytest.raises(InputError, match="nothing would teach"):
        load(overrides=["vsd.weight=0", "discriminator.weight=0"])


def test_guidance_is_bounded_and_may_be_none():
    assert load(overrides=["teacher.guidance_scale=0"]).teacher.guidance_scale == 0
    for wrong in ("-1", "100.5", ".inf", ".nan"):
        with pytest.raises(InputError, match=r"teacher.guidance_scale: "):
            load(overrides=[f"teacher.guidance_scale={wrong}"])


def test_command_line_mistakes_end_with_code_two(capsys):
    with pytest.raises(SystemExit) as stopped:
        from_command_line("x", ["--config", "no/such.yaml"])
    assert stopped.value.code == 2
    assert "no/such.yaml: no such file" in capsys.readouterr().err


def test_print_config_reads_back_the_same(capsys):
    with pytest.raises(SystemExit) as stopped:
        from_command_line("x", ["student.lr=3e-6", "--print-config"])
    assert stopped.value.code == 0
    assert validate(yaml.safe_load(capsys.readouterr().out)) == load(overrides=["student.lr=3e-6"])


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        from_command_line("Purpose here.", ["--help"])
    text = capsys.readouterr().out
    assert "Purpose here." in text
    assert all(f"  {key} (" in text for key, *_ in fields())


def test_hash_follows_the_maths_only():
    base = load()
    assert config_hash(base) == config_hash(load(overrides=["run.name=other", "distill.overlap=false"]))
    assert config_hash(base) != config_hash(load(overrides=["student.lr=1e-3"]))


DECISIVE = {
    "run": "seed",
    "student": "autocast ema ema_decay ema_half_life ema_sigma_rel kind lora_start lr max_grad_norm model optimizer rank start_timestep "
    "steps targets unet",
    "teacher": "guidance_scale model sampling_steps",
    "teachers": "attention backend channels_last compile dtype quantize shards slice threads_per_rank",
    "bridge": "anchor_weight attention.depth_fraction attention.layers attention.normalize attention.rows "
    "attention.temperature attention.weight batch_size checkpoint depths embed_dim heads lr lr_decay micro_batches "
    "mixed_precision pairs prior projector shuffle source steps trainable trainable_lr validation_share window",
    "synthesis": "augment_share batch_size caption_column count dtype guidance_scale image_column image_count images min_pixels posterior "
    "sampling_steps shard_size shards teacher threads_per_encoder",
    "fake_score": "batch_size first_blocks kind last_blocks lr max_grad_norm optimizer rank shard updates",
    "discriminator": "depth_fraction depths fake_weight lr r1_sigma r1_weight ramp_steps real_count real_data real_source shared_pass "
    "standardize step_together weight width",
    "vsd": "guidance_rescale shift t_max t_min weight",
    "reward": "metric ramp_steps share weight",
    "distill": "batch_size channels_last compile evaluate_every micro_batches min_workers mixed_precision schedule steps tf32 threads "
    "warmup_steps workers",
    "prompts": "column encoder_dtype gpus_per_encoder max_characters on_bad_row path threads_per_encoder",
    "evaluation": "batch_size count holdout judge metric metrics periodic_count prompts seed",
}


def test_a_resume_may_change_what_decides_no_number_and_nothing_else():
    """The keys as earlier versions had them, but for those that decide no number and were refused all the same."""
    decisive = {f"{section}.{key}" for section, keys in DECISIVE.items() for key in keys.split()}
    for config in (load(), load(overrides=["bridge.checkpoint=null"])):
        found = {key: value for key, value in flatten(config).items() if key in decisive}
        found["distill.steps"] = DistillConfig().steps  # it decides where the learning rates fall until the last update
        assert mathematical(config) == found
    falling = load(overrides=["distill.schedule=cosine", "distill.steps=77"])
    assert mathematical(falling)["distill.steps"] == 77


@pytest.mark.parametrize("change", ["distill.resize_after_s=5", "evaluation.grid=4"])
def test_keys_that_decide_no_number_may_change_on_a_resume(tmp_path, change):
    assert_resumes(tmp_path, [], [change])


def test_the_fewest_workers_decide_numbers_while_a_bridge_trains_and_else_none(tmp_path):
    elastic = ["distill.workers=4", "distill.min_workers=2"]
    assert_resumes(tmp_path / "given", elastic, ["distill.min_workers=1"])
    assert_resumes(
        tmp_path / "identity",
        [*elastic, "bridge.checkpoint=null", "bridge.projector=identity"],
        ["distill.min_workers=null"],
    )
    with pytest.raises(InputError, match=r"must not change them: distill\.min_workers: 2 -> 1\. "):
        assert_resumes(tmp_path / "trained", [*elastic, "bridge.checkpoint=null"], ["distill.min_workers=1"])


def assert_resumes(storage, overrides, changes):
    """A run with `overrides` was begun by an earlier version; it is resumed with `changes` besides."""
    before = load(overrides=[f"storage={storage}", "run.name=mine", *overrides])
    (storage / "mine").mkdir(parents=True)
    (storage / "mine" / "config.yaml").write_text(yaml.safe_dump(before.model_dump(), sort_keys=False))
    now = load(overrides=[f"storage={storage}", "run.name=mine", *overrides, *changes])
    assert now != before
    assert open_run_folder(now).path == storage.resolve() / "mine"


def test_a_text_in_quotes_stays_a_text_and_a_number_needs_no_point(tmp_path):
    (tmp_path / "file.yaml").write_text("run: {name: '1e5'}\nstudent: {lr: 1e-5}\ndistill: {steps: 2e3}\n")
    for config in (
        load(tmp_path / "file.yaml"),
        load(overrides=["run.name='1e5'", "student.lr=1e-5", "distill.steps=2e3"]),
    ):
        assert (config.run.name, config.student.lr, config.distill.steps) == ("1e5", 1e-5, 2000)
        assert from_yaml(to_yaml(config)) == config
    with pytest.raises(InputError, match=r"run.name: .*needs quotes.* \(got 100000.0\)"):
        load(overrides=["run.name=1e5"])


def test_yaml_files_extend_each_other(tmp_path):
    (tmp_path / "base.yaml").write_text("student: {lr: 1.0e-3}\ndistill: {steps: 7}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ndistill: {batch_size: 3}\n")
    config = load(tmp_path / "child.yaml")
    assert (config.student.lr, config.distill.steps, config.distill.batch_size) == (1e-3, 7, 3)


def test_of_several_extended_files_the_later_win_and_the_file_itself_over_all(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "a.yaml").write_text("student: {lr: 1.0e-3}\ndistill: {steps: 7, batch_size: 1}\n")
    (tmp_path / "parts/b.yaml").write_text("extends: ../a.yaml\ndistill: {steps: 8}\nteachers: {shards: 4}\n")
    (tmp_path / "c.yaml").write_text("distill: {steps: 9}\n")
    (tmp_path / "child.yaml").write_text("extends: [parts/b.yaml, c.yaml]\nteachers: {shards: 3}\n")
    config = load(tmp_path / "child.yaml")
    assert (config.student.lr, config.distill.steps, config.distill.batch_size) == (1e-3, 9, 1)
    assert config.teachers.shards == 3


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("studnet: {lr: 1}", r"unknown key studnet; did you mean student\? \(in .*part.yaml\)"),
        ("student: {lr: -1}", r"student.lr: .*greater than 0 \(got -1\) \(in .*part.yaml\)"),
        ("bridge: {depths: [6, x]}", r"bridge.depths.1: .*integer.* \(in .*part.yaml\)"),
        ("vsd: {t_min: 0.9, t_max: 0.1}", r"t_min .* must be below t_max .*\(in .*part.yaml\)"),
        ("extends: nowhere.yaml", "part.yaml: extends .*nowhere.yaml, which does not exist"),
        ("extends: child.yaml", "part.yaml: extends .*child.yaml, which extends it"),
        ("extends: {a: b}", "part.yaml: extends must be a file name or a list"),
        ("extends: [3]", "part.yaml: extends must be a file name or a list"),
        ("- 1", "part.yaml: must be a mapping"),
    ],
)
def test_mistakes_in_an_extended_file_name_that_file(part, message, tmp_path):
    (tmp_path / "part.yaml").write_text(part)
    (tmp_path / "child.yaml").write_text("extends: [part.yaml]\ndistill: {steps: 3}\n")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "child.yaml")


def test_a_wrong_override_is_not_blamed_on_a_file(tmp_path):
    (tmp_path / "child.yaml").write_text("student: {lr: 1.0e-3}\n")
    with pytest.raises(InputError) as error:
        load(tmp_path / "child.yaml", ["student.lr=-1"])
    assert "child.yaml" not in str(error.value)


def test_broken_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(InputError, match="bad.yaml: not valid YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="must be a mapping"):
        load(tmp_path / "list.yaml")


def test_relative_storage_under_job_submission_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match="name an absolute folder"):
        check_storage(load())
    assert check_storage(load(overrides=[f"storage={tmp_path}"])) == tmp_path.resolve()


def test_config_round_trips_through_yaml_as_earlier_versions_read_and_wrote_it():
    config = load(overrides=["student.lr=1e-5"])
    assert from_yaml(to_yaml(config)) == validate(yaml.safe_load(to_yaml(config))) == config
    assert from_yaml(yaml.safe_dump(config.model_dump())) == config
    assert from_yaml(to_yaml(config).replace("1.0e-05", "1e-5")) == config, "as people write it"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("/venv/bin/raydistill distill", "raydistill distill"),
        ("/home/me/raydistill/jobs/distill.py", "python3 jobs/distill.py"),
    ],
)
def test_the_command_that_is_shown_can_be_typed_again(monkeypatch, typed, shown):
    monkeypatch.setattr("sys.argv", [typed])
    uri = "tracking.uri=http://me:hunter2@host"
    config = from_command_line("x", ["--config", "sdxl_sd15", "student.lr=3e-6", uri])
    assert shown_command(config) == f"{shown} --config sdxl_sd15 student.lr=3e-6 'tracking.uri=http://***@host'"
    assert shown_command(from_command_line("x", [])) == f"{shown} --config shapes"


def test_a_configuration_knows_its_file_and_overrides_whatever_the_process_was_started_with(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json", "a=b"])
    config = changed(load("sdxl_sd15", ["run.name=x", "vsd={weight: 0.5}"]), {"run": {"seed": 4}})
    assert shown_command(config) == "raydistill.distill('sdxl_sd15', 'run.name=x', 'vsd={weight: 0.5}')"
    assert config.origin.keys >= {"run.name", "vsd.weight"}
    assert config == from_yaml(to_yaml(config)), "the origin is no part of it"
    assert config.model_copy().origin is config.origin
