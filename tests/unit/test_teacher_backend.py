"""How teachers are held is decided once, before the launch; a run that goes on keeps it."""

from __future__ import annotations

import pytest

from raydistill.config.reading import from_yaml, load, to_yaml
from raydistill.driver import job as job_module
from raydistill.driver.backend import decided
from raydistill.driver.run_folder import RunFolder, create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.planning import memory
from raydistill.planning.memory import check_launch
from raydistill.planning.slices import with_slice

GPU = "{memory_gib: GIB, bf16_tflops: 1, fp32_tflops: 1, link_gbytes: 1, per_node: 1, price: 1, spot_price: 1}\n"
ON_GPUS = ["teachers.gpus_per_rank=1", "teachers.slice=2", "plan.teacher_gpu=mine", "plan.reserve=0"]


@pytest.fixture
def config(tmp_path):
    """`config(GiB of a GPU, *overrides)`."""

    def make(gib: float, *overrides: str):
        file = tmp_path / f"gpus-{gib}.yaml"
        file.write_text("mine: " + GPU.replace("GIB", str(gib)))
        return load(overrides=[f"storage={tmp_path}", "run.name=mine", *ON_GPUS, f"plan.gpus={file}", *overrides])

    return make


def backend(config, roles=None):
    return decided(config, open_run_folder(config), roles).teachers.backend


def test_ranks_on_cpus_share_the_teacher_and_the_planner_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("raydistill.planning.memory.decided_backend", None)
    on_cpus = [f"storage={tmp_path}", "run.name=mine"]
    assert backend(load(overrides=on_cpus)) == "zero3"
    assert backend(load(overrides=[*on_cpus, "teachers.backend=plain"])) == "plain"
    assert backend(load(overrides=[*on_cpus, "teachers.quantize=int8"])) == "plain"
    assert backend(load(overrides=[*on_cpus, *ON_GPUS, "plan.launch=ignore"])) == "zero3"
    assert backend(load(overrides=[*on_cpus, *ON_GPUS]), ["Bridge training"]) == "zero3"


def test_on_gpus_a_teacher_that_fits_one_is_held_whole(config):
    assert backend(config(1.0)) == "plain"
    assert backend(config(0.002)) == "zero3"
    with pytest.raises(InputError, match=r"teachers\.backend=zero3 with teachers\.shards=\d+ is enough|not even with"):
        check_launch(config(0.002, "teachers.backend=plain", "bridge.checkpoint=null"), ["teacher rank"])


def test_a_run_that_goes_on_keeps_what_was_decided(config, tmp_path):
    begun = decided(config(1.0), open_run_folder(config(1.0)))
    run = RunFolder(tmp_path, "mine")
    create_run_folder(run, begun)
    assert backend(config(0.002)) == "plain", "the planner would say zero3 now"
    with pytest.raises(InputError, match=r"teachers\.backend: 'plain' -> 'zero3'"):
        open_run_folder(config(1.0, "teachers.backend=zero3"))


def test_a_slice_is_as_large_as_fits_and_as_a_request_fills(config, tmp_path):
    """Of 32 samples two ranks have 16 each, which a small GPU takes in several equal forwards."""
    auto = ("teachers.slice=auto", "teachers.backend=plain", "distill.batch_size=32")

    def decided_slice(gib, *others):
        return decided(config(gib, *auto, *others), open_run_folder(config(gib, *auto, *others))).teachers.slice

    assert decided_slice(1.0) == 16
    assert decided_slice(1.0, "distill.micro_batches=4") == 4
    small = next(gib for gib in (0.016, 0.012, 0.008, 0.006, 0.004, 0.003) if decided_slice(gib) < 16)
    found = config(small, *auto[1:], f"teachers.slice={decided_slice(small)}")
    assert all("fits" in line for line in check_launch(found, ["teacher rank"]))
    create_run_folder(RunFolder(tmp_path, "mine"), found)
    assert decided_slice(1.0) == found.teachers.slice, "a run that goes on keeps it"
    assert (
        decided(
            load(overrides=[f"storage={tmp_path}", "run.name=other", *auto]), RunFolder(tmp_path, "other")
        ).teachers.slice
        == 8
    )


def test_backend_and_slice_are_decided_together_as_the_plan_does(config):
    """A GPU that has room for the whole teacher at a smaller slice alone."""
    auto = ("teachers.slice=auto", "teachers.backend=auto", "distill.batch_size=32")
    for gib in (0.03, 0.02, 0.016, 0.014, 0.012, 0.01):
        found = decided(config(gib, *auto), open_run_folder(config(gib, *auto)))
        planned = with_slice(config(gib, *auto))
        assert found.teachers.slice == planned.teachers.slice
        assert found.teachers.backend == memory.decided_backend(planned)


def test_a_run_of_a_version_without_the_key_shares_its_teachers(config, tmp_path):
    run = RunFolder(tmp_path, "mine")
    create_run_folder(run, config(1.0))
    saved = run.path / "config.yaml"
    lines = to_yaml(from_yaml(saved.read_text())).splitlines()
    saved.write_text("\n".join(line for line in lines if not line.strip().startswith("backend:")))
    assert "backend" not in saved.read_text()
    assert backend(config(1.0)) == backend(config(1.0, "teachers.backend=zero3")) == "zero3"
    with pytest.raises(InputError, match=r"teachers\.backend: 'zero3' -> 'plain'"):
        open_run_folder(config(1.0, "teachers.backend=plain"))


def test_the_checks_before_a_launch_decide(tmp_path):
    config = load(overrides=[f"storage={tmp_path}", "run.name=mine"])
    job = job_module.Job(run="raydistill.driver.pipeline:distil", result="summary.json")
    prepared = job_module.prepare(job, config)
    assert config.teachers.backend == "auto"
    assert prepared.config.teachers.backend == "zero3"
    assert prepared.config.origin == config.origin


@pytest.mark.parametrize("setting", ["compile=true", "channels_last=true", "quantize=int8", "quantize=fp8"])
def test_what_needs_whole_networks_says_so(setting):
    with pytest.raises(InputError, match=f"{setting.split('=')[0]} needs whole networks: teachers.backend=plain"):
        load(overrides=[f"teachers.{setting}", "teachers.backend=zero3"])
