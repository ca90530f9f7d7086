"""The planner's check before a launch: what does not fit its GPUs is refused with key and remedy, before anything starts."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.config.reading import load
from raydistill.driver import room
from raydistill.errors import InputError
from raydistill.planning import counting
from raydistill.planning.counts import changed
from raydistill.planning.gpus import GIB
from raydistill.planning.memory import check_launch, shared_bytes
from raydistill.spaces import meta

ROOT = Path(__file__).resolve().parents[2]
GPUS = ["distill.gpus_per_worker=1", "teachers.gpus_per_rank=1", "distill.batch_size=2", "teachers.slice=2"]


@pytest.fixture
def small_gpu(tmp_path):
    """Overrides that name a GPU which holds the miniature teacher, but no trainer of it."""
    file = tmp_path / "gpus.yaml"
    file.write_text(
        "tiny: {memory_gib: 0.04, bf16_tflops: 1, fp32_tflops: 1, link_gbytes: 1, per_node: 1, price: 1, spot_price: 1}\n"
    )
    return [f"plan.gpus={file}", "plan.trainer_gpu=tiny", "plan.teacher_gpu=tiny"]


def test_what_fits_says_so_and_what_does_not_names_key_and_remedy(small_gpu):
    fits, warning = check_launch(load(overrides=[*GPUS, *small_gpu, "plan.launch=warn"]))
    assert fits.startswith("fits: teacher rank: needs ")  # there is no third line: the Bridge is trained already
    assert warning.startswith("WARNING: trainer: needs ")
    remedies = "distill.micro_batches=2 or distill.batch_size=1 or distill.gradient_checkpointing=true would"
    assert warning.endswith(f"distill.gpus_per_worker=1 tiny has 0.0; {remedies}")


@pytest.mark.full
def test_recomputing_is_advised_where_it_is_enough(tmp_path, small_gpu):
    """The GPU is given the memory that a recomputing trainer needs, and a little more."""
    config = load(overrides=[*GPUS, "distill.batch_size=32"])
    spaces = (meta.open_space(model) for model in (config.student.model, config.teacher.model))
    enough = counting.count_trainer(changed(config, gradient_checkpointing=True), *spaces).peak
    file = tmp_path / "gpus.yaml"
    file.write_text(file.read_text().replace("0.04", f"{1.2 * enough / GIB}"))
    settings = [*GPUS, *small_gpu, "distill.batch_size=32"]
    with pytest.raises(InputError, match="distill.gradient_checkpointing=true would") as refused:
        check_launch(load(overrides=settings), ["trainer"])
    advised = re.findall(r"distill\.(?:micro_batches|batch_size)=\d+", str(refused.value))
    assert len(advised) == 2
    for remedy in (*advised, "distill.gradient_checkpointing=true"):
        (line,) = check_launch(load(overrides=[*settings, remedy]), ["trainer"])
        assert line.startswith("fits: trainer"), remedy


@pytest.mark.full
def test_what_fits_only_together_fits_as_it_is_advised(tmp_path, small_gpu):
    """The GPU is given the memory that a trainer needs which takes all of it, and a little more."""
    settings = [*GPUS, *small_gpu, "distill.batch_size=2", "distill.workers=2", "distill.mixed_precision=true"]
    all_of = [
        "distill.micro_batches=2", "distill.gradient_checkpointing=true", "fake_score.base_dtype=bfloat16",
        "fake_score.shard=true", "student.optimizer=adamw8bit",
    ]  # fmt: skip
    config = load(overrides=[*settings, *all_of])
    counted = counting.count_trainer(
        config, *(meta.open_space(m) for m in (config.student.model, config.teacher.model))
    )
    enough = counted.peak - shared_bytes(counted.weights, config)
    file = tmp_path / "gpus.yaml"
    file.write_text(file.read_text().replace("0.04", f"{1.02 / 0.9 * enough / GIB}"))
    with pytest.raises(InputError, match="together would") as refused:
        check_launch(load(overrides=settings), ["trainer"])
    advised = re.search(r"has [\d.]+; (.*) together would", str(refused.value)).group(1).split()
    assert set(advised) <= {*all_of, "fake_score.optimizer=adamw8bit", "student.shard=true"}
    assert len(advised) >= 3
    (line,) = check_launch(load(overrides=[*settings, *advised]), ["trainer"])
    assert line.startswith("fits: trainer")


def test_a_share_of_a_gpu_has_a_share_of_its_memory(small_gpu):
    def check(share):
        return check_launch(
            load(
                overrides=[
                    *GPUS,
                    *small_gpu,
                    f"teachers.gpus_per_rank={share}",
                    "teachers.shards=1",
                    "bridge.checkpoint=null",
                ]
            ),  # fmt: skip
            ["teacher rank"],  # which draws pictures
        )

    assert "teacher rank" in check(1)[0]
    with pytest.raises(InputError, match=r"teacher rank: .*teachers.gpus_per_rank=0.1 tiny has 0.0; "):
        check(0.1)


def test_nothing_is_counted_for_roles_without_gpus(monkeypatch):
    def never(*args):
        raise AssertionError("counted")

    for name in ("count_trainer", "count_teacher", "count_bridge"):
        monkeypatch.setattr(counting, name, never)
    assert check_launch(load()) == []
    assert check_launch(load(overrides=[*GPUS, "plan.launch=ignore"])) == []
    with pytest.raises(AssertionError, match="counted"):
        check_launch(load(overrides=GPUS))


def test_an_unknown_kind_of_gpu_is_named():
    with pytest.raises(InputError, match=r"plan.trainer_gpu: H1000 is not in the table \(H100, "):
        check_launch(load(overrides=[*GPUS, "plan.trainer_gpu=H1000"]))


@pytest.mark.full
def test_a_job_that_does_not_fit_ends_with_code_two_before_anything_starts(small_gpu, monkeypatch, capfd, tmp_path):
    storage = tmp_path / "storage"
    monkeypatch.setattr(
        "sys.argv", ["jobs/distill.py", f"storage={storage}", "run.name=mine", "controls=[]", *GPUS, *small_gpu]
    )
    monkeypatch.setattr(room, "this_machine", lambda: {"CPU": 8.0, "GPU": 3.0})  # else it is refused for that already
    assert runpy.run_path(str(ROOT / "jobs" / "distill.py"))["main"]() == 2
    assert "error: trainer: " in capfd.readouterr().err
    assert not (storage / "mine").exists()


@pytest.mark.full
def test_a_job_without_gpus_does_not_even_import_the_planner():
    code = "import sys, raydistill.driver.job as job, raydistill.driver.preflight; from raydistill.config.reading import load; assert job._check_gpus(load(), ['trainer']) == []"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}; sys.exit(any(name.startswith('raydistill.planning') for name in sys.modules))",
        ],
        cwd=ROOT,
    )
    assert done.returncode == 0
