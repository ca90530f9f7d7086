"""The share of the peak that the planner counts with: by kind of GPU and role, published, measured, assumed or configured."""

from __future__ import annotations

import argparse

import pytest

from raydistill.benchmark import speeds
from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.planning import verdict
from raydistill.planning.gpus import MEASURED, keep_measured, kind_of, known_gpus, read_gpus
from raydistill.storage.staging import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_CACHE", str(tmp_path / "cache"))


def told(gpus, kind: str, config=None) -> dict[str, tuple[float, str]]:
    speed = {role: gpus[kind].of(role, config or load()) for role in ("teacher", "trainer", "text", "vae")}
    return {role: (one.share, one.source) for role, one in speed.items()}


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [("H100", (0.30, "published")), ("H200", (0.30, "assumed")), ("A100-80", (0.43, "published")),
     ("L40S", (0.33, "published")), ("4090", (0.40, "assumed"))],
)  # fmt: skip
def test_the_table_says_what_is_published_and_a_trainer_has_its_teacher_s_share(kind, teacher):
    found = told(known_gpus(load()), kind)
    assert found == {
        "teacher": teacher, "trainer": (teacher[0], "assumed"), "text": (0.4, "assumed"), "vae": (0.4, "assumed"),
    }  # fmt: skip


def test_a_configured_share_is_that_of_every_role():
    config = load(overrides=["plan.efficiency=0.2"])
    assert set(told(known_gpus(config), "H100", config).values()) == {(0.2, "plan.efficiency")}


def test_compiled_networks_reach_more_where_that_is_known(tmp_path):
    config = load(overrides=["teachers.compile=true", "distill.compile=true"])
    gpus = known_gpus(config)
    compiled = {kind: told(gpus, kind, config) for kind in ("H100", "L40S")}
    assert compiled["H100"]["teacher"] == (0.45, "published")
    assert compiled["H100"]["trainer"] == (0.45, "assumed")
    assert compiled["L40S"] == told(gpus, "L40S")  # not known
    alone = load(overrides=["distill.compile=true"])
    assert told(gpus, "H100", alone)["teacher"] == (0.30, "published")
    assert told(gpus, "H100", alone)["trainer"] == (0.45, "assumed")
    keep_measured(cache_folder() / MEASURED, "H100", {"trainer": 0.5, "teacher_compiled": 0.52})
    assert told(known_gpus(alone), "H100", alone)["trainer"] == (0.52, "assumed")
    keep_measured(cache_folder() / MEASURED, "H100", {"trainer_compiled": 0.4})
    assert told(known_gpus(alone), "H100", alone)["trainer"] == (0.5, "measured"), "what is less was badly compiled"
    assert ", trainers 45% on H100 (assumed, compiled), " in verdict.speeds(alone, gpus)


def test_what_was_measured_here_is_read_over_the_table_role_by_role(tmp_path):
    keep_measured(cache_folder() / MEASURED, "L40S", {"teacher": 0.31234567})
    keep_measured(cache_folder() / MEASURED, "L40S", {"trainer": 0.25})
    keep_measured(cache_folder() / MEASURED, "B200", {"teacher": 0.5})  # of a kind that the table lacks
    gpus = known_gpus(load())
    assert told(gpus, "L40S") == {
        "teacher": (0.3123, "measured"), "trainer": (0.25, "measured"), "text": (0.4, "assumed"), "vae": (0.4, "assumed"),
    }  # fmt: skip
    assert told(gpus, "H100")["teacher"] == (0.30, "published")
    other = tmp_path / "other.yaml"
    keep_measured(other, "L40S", {"teacher": 0.2})
    named = load(overrides=[f"plan.measured={other}"])
    assert told(known_gpus(named), "L40S", named)["teacher"] == (0.2, "measured")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("L40S: {teacher: {share: 1.5, source: measured}}", "L40S: teacher.share: .*less than or equal to 1"),
     ("L40S: {techer: {share: 0.5, source: measured}}", "L40S: techer: .*not permitted"), ("- 3", "must map")],
)  # fmt: skip
def test_a_wrong_file_is_named_with_kind_and_role(text, problem, tmp_path):
    file = tmp_path / "speeds.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"^plan\.measured: {file}: {problem}"):
        known_gpus(load(overrides=[f"plan.measured={file}"]))
    with pytest.raises(InputError, match=r"^plan\.measured: .*No such file"):
        known_gpus(load(overrides=[f"plan.measured={tmp_path / 'none.yaml'}"]))


def test_the_plan_says_where_its_speeds_come_from():
    keep_measured(cache_folder() / MEASURED, "H100", {"trainer": 0.5})
    config = load(overrides=["plan.teacher_gpu=L40S", "plan.trainer_gpu=H100"])
    assert verdict.speeds(config, known_gpus(config)) == (
        "teachers 33% on L40S (published), trainers 50% on H100 (measured), text encoders 40% on L40S (assumed), VAEs 40% "
        "on L40S (assumed)"
    )


# -- what the benchmark measures ----------------------------------------------------------------------------

SCORES = [
    {"model": "a", "kind": "eager", "tflops": 200.0}, {"model": "a", "kind": "eager", "tflops": 300.0},
    {"model": "a", "kind": "compiled", "tflops": 900.0}, {"model": "b", "kind": "eager", "tflops": 400.0},
    {"model": "c", "kind": "eager", "tflops": 100.0},
]  # fmt: skip
STUDENT = {"flops": 2e12, "flops_32": 1e12, "seconds": 0.1}
ENCODERS = {"vae_flops": 1e12, "vae_s": 0.01, "text_flops": 5e12, "text_s": 0.01}
RESULT = {"scores": SCORES, "student": STUDENT, "encoders": ENCODERS}


def arguments(**values) -> argparse.Namespace:
    return argparse.Namespace(**{"kind": "", "speeds": "", "dry_run": False} | values)


def test_shares_are_of_the_data_sheet_and_teachers_count_as_they_run():
    found = speeds.shares(read_gpus()["H100"], **{"scores": SCORES, "student": STUDENT, "other": ENCODERS})
    assert found["teacher"] == pytest.approx(
        300 / 989
    )  # the best eager one of each model, and of the models the median
    assert found["teacher_compiled"] == pytest.approx(900 / 989)
    assert found["trainer"] == pytest.approx((1 / 989 + 1 / 67) / 0.1)
    assert found["vae"] == pytest.approx(1 / 494 / 0.01)
    assert found["text"] == pytest.approx(5 / 989 / 0.01)


def test_the_benchmark_writes_where_the_planner_reads():
    kept = speeds.keep(arguments(), "NVIDIA H100 80GB HBM3", RESULT)
    assert kept["file"] == str(cache_folder() / MEASURED)
    assert told(known_gpus(load()), "H100")["teacher"] == (0.3033, "measured")
    assert "the planner reads" in speeds.line(kept)


@pytest.mark.parametrize(
    ("device", "more", "why"),
    [
        ("NVIDIA B200", {}, "gpus.yaml has no kind for 'NVIDIA B200'"),
        ("a CPU", {"kind": "H100", "dry_run": True}, "dry run"),
    ],
)
def test_it_writes_nothing_for_an_unknown_card_or_a_dry_run(device, more, why):
    assert why in speeds.keep(arguments(**more), device, RESULT)["skipped"]
    assert not (cache_folder() / MEASURED).exists()


def test_kinds_are_found_by_the_driver_s_names():
    gpus = read_gpus()
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100-80",
             "NVIDIA L40S": "L40S", "NVIDIA GeForce RTX 4090": "4090", "Tesla T4": None}  # fmt: skip
    assert {name: kind_of(name, gpus) for name in names} == names


def test_both_encoders_are_timed_at_the_miniature_s_size():
    import torch

    from raydistill.benchmark.measure import timed

    row = speeds.encoders("shapes:sd3", lambda call: timed(call), torch.device("cpu"))
    assert all(value > 0 for value in row.values())
