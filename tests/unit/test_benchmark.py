"""The benchmark's frame, and the sections that need neither Ray nor a GPU: what they measure, and what they print."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest
import torch

from raydistill.benchmark import SECTIONS, measure, models
from raydistill.benchmark import gpu as gpu_section
from raydistill.benchmark import scale as scale_section
from raydistill.benchmark import schedule as schedule_section
from raydistill.distillation import batches, schedule, updates

pytestmark = pytest.mark.full

LATER = {"chaos"}  # sections that may come from elsewhere


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Results go to a temporary folder; threads are left as they were."""
    threads = torch.get_num_threads()
    yield ["--storage", str(tmp_path)]
    torch.set_num_threads(threads)


def test_without_a_section_the_job_lists_them(run_script):
    code, out, _ = run_script("benchmark")
    assert code == 2
    assert all(f"\n  {name} " in out for name in SECTIONS)
    assert run_script("benchmark", "--help")[0] == 0


def test_an_unknown_section_is_named(run_script):
    code, _, error = run_script("benchmark", "speed")
    assert code == 2
    assert error.startswith("error: no section 'speed'; there are all, schedule, service, ")


@pytest.mark.parametrize("name", sorted(set(SECTIONS) - LATER))
def test_every_section_has_its_three_functions_and_options_with_defaults(name):
    section = importlib.import_module(f"raydistill.benchmark.{name}")
    parser = argparse.ArgumentParser()
    section.add_arguments(parser)
    parser.parse_args([])
    assert callable(section.run)
    assert callable(section.table)


def test_without_a_gpu_the_section_says_so_and_ends_well(run_script, here, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, out, _ = run_script("benchmark", "gpu", *here)
    assert code == 0
    assert "there is no GPU here" in out
    result = json.loads((tmp_path / "benchmark" / "gpu.json").read_text())
    assert set(result) == {"section", "machine", "command", "skipped"}
    assert gpu_section.table(result) == result["skipped"]


def test_the_gpu_section_compares_with_the_paper_and_the_plan():
    """On the CPU, with the miniature world's sizes, as `--dry-run` does."""
    arguments, cpu = argparse.Namespace(dry_run=True, repeats=1), torch.device("cpu")
    step, (bridge,) = gpu_section._student_step(arguments, cpu), gpu_section._bridges(arguments, cpu)
    assert step["peak_bytes"] == pytest.approx(step["counted_bytes"], rel=0.15)
    assert bridge["added_s"] == bridge["bridge_s"] + bridge["teacher_decoder_s"] - bridge["student_decoder_s"]
    result = {"scores": [], "zero3": {}, "matrix_tflops": 1.0, "torch": "2", "repeats": 1, "dry_run": True}
    seconds = {"bridge_s": 0.004, "teacher_decoder_s": 0.005, "student_decoder_s": 0.002, "added_s": 0.007}
    result |= {"student": step | {"counted_bytes": 2e9, "peak_bytes": 3e9}, "bridges": [bridge | seconds]}
    result["speeds"] = {"kind": "H100", "shares": {"teacher": 0.3}, "file": "speeds.yaml"}
    text = gpu_section.table(result)
    assert "| SD 3.5 | 4 ms | 5 ms | 2 ms | +7 ms | +7.45 ms |" in text
    assert "counted 2 GB, measured 3 GB, measured / counted 1.500" in text
    assert "of the data sheet's peak of H100: teacher 30.0%; the planner reads speeds.yaml" in text


def test_a_real_size_step_changes_the_student_through_the_bridge(run_script, here, tmp_path):
    """On the miniature world's sizes; the real ones need a minute and 12 GB."""
    code, out, _ = run_script("benchmark", "realsize", "--dry-run", "--threads", "1", *here)
    assert code == 0
    result = json.loads((tmp_path / "benchmark" / "realsize.json").read_text())
    assert result["changed"]
    assert result["finite"]
    assert result["without_gradient"] == []
    assert result["gradient_norm"] > 0
    assert "weights changed" in out


class _Clock:
    """Stands for the module `time`: a look at it takes a millisecond, and sleeping takes what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Sleeping:
    """Teachers that take `seconds` of a clock, without a service."""

    def __init__(self, seconds: float, clock: _Clock) -> None:
        self.seconds, self.clock = seconds, clock

    def __call__(self, made):
        self.due, self.made = self.clock.perf_counter() + self.seconds, made
        return self

    def result(self):
        self.clock.sleep(max(0.0, self.due - self.clock.perf_counter()))
        return torch.zeros_like(self.made.x_t)


@pytest.fixture
def clock(monkeypatch):
    """The clock that steps are timed by."""
    clock = _Clock()
    for module in (schedule, updates, batches):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_slow_teacher_is_hidden_behind_the_fake_updates_and_bounds_the_step(clock):
    worker, _ = models.default_trainer(4, 2)
    found = schedule_section._measure(worker, _Sleeping(1.0, clock), steps=2)
    assert found["teacher_s"] == pytest.approx(1.0, abs=0.003)  # a few looks at the clock
    assert found["bound_s"] == found["make_s"] + max(found["fake_s"], found["teacher_s"]) + found["student_s"]
    assert found["fake_s"] > 0
    assert found["wait_s"] == pytest.approx(found["teacher_s"] - found["fake_s"], abs=0.003)
    assert found["sequential_s"] == pytest.approx(found["overlapped_s"] + found["fake_s"], abs=0.003)


def test_a_step_with_the_teacher_in_its_process_stands_beside_those_with_a_service(monkeypatch, clock):
    monkeypatch.setattr(schedule_section, "cores", lambda: 1)  # threads of a busy machine wait for each other
    worker, local = models.default_trainer(4, 2)
    simulated = schedule_section._measure(worker, _Sleeping(0.0, clock), steps=1)
    assert "in_process_s" not in simulated
    real = schedule_section._measure(worker, _Sleeping(0.0, clock), 1, local)
    assert real["in_process_s"] > 0
    real |= schedule_section._on_all_cores(worker, local, steps=1)
    assert real["in_process_all_s"] > 0
    real |= {"overlapped_s": 0.2, "in_process_s": 0.3, "in_process_all_s": 0.25, "cores": 2}
    rows = [{"teacher": "sleeps"} | simulated, {"teacher": "real"} | real]
    text = schedule_section.table({"rows": rows, "steps": 1, "batch_size": 4, "fake_updates": 2})
    assert text.splitlines()[2].endswith("| – | – |")
    assert text.splitlines()[3].endswith("| 300 ms | 1.50 |")
    assert "On 2 threads, when the service was gone, such a step takes 250 ms, 1.25 of the overlapped one." in text


def test_the_scale_section_says_where_the_process_that_asks_is_full():
    row = {"per_s": 7.8, "of_linear": 0.97}
    rows = [
        row | {"replicas": 1, "driver_cpu_s": 0.04, "router_cpu_s": 0.02},
        row | {"replicas": 8, "driver_cpu_s": 0.01, "router_cpu_s": 0.004},
    ]
    result = {"replicas": rows, "trainers": [], "seconds": 1.0, "requests": 4, "megabytes": 8.0, "steps": 6}
    text = scale_section.table(result)
    assert text.splitlines()[3] == "| 8 | 7.80 | 97.0% | 10 ms | 4 ms |"
    assert "With 8 replicas such a request took 10 ms of the driver's CPU, 4 ms of them in Serve's router" in text
    assert "one core of the driver is full at 100 requests/s, the router's thread at 250." in text
    assert text.endswith("at most 100 / distill.micro_batches updates/s a trainer.")


def test_actions_take_turns_and_give_medians():
    calls = []
    found = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
    assert all(seconds >= 0 for seconds in found.values())


def test_a_tables_rows_have_all_columns_and_their_units():
    text = measure.markdown("x | y | ", "{a:ms} | {b:MB} | {b:.1f}", [{"a": 0.5, "b": 2e6}, {"a": None, "b": ""}])
    assert text.splitlines() == ["| x | y |  |", "|---|---|---|", "| 500 ms | 2 MB | 2000000.0 |", "| – |  |  |"]
    assert measure.markdown("x | y", "{} | {:+ms}", [(1, -0.002)]).splitlines()[2] == "| 1 | -2 ms |"


def test_an_options_type_is_its_defaults():
    parser = argparse.ArgumentParser()
    for name, default in (("--flag", False), ("--sizes", (0.5, 1)), ("--steps", 3), ("--only", None)):
        measure.option(parser, name, default, "")
    assert vars(parser.parse_args([])) == {"flag": False, "sizes": (0.5, 1), "steps": 3, "only": None}
    given = parser.parse_args(["--flag", "--sizes", "2", "3", "--steps", "4", "--only", "5"])
    assert vars(given) == {"flag": True, "sizes": [2.0, 3.0], "steps": 4, "only": "5"}


def test_a_process_that_fails_is_named():
    with pytest.raises(RuntimeError, match="raydistill.benchmark: the process that measures {'pair': None} failed"):
        measure.in_processes("raydistill.benchmark", [{"pair": None}])  # a package, which cannot be run


def test_resident_memory_grows_by_what_is_touched():
    before = measure.resident()
    kept = torch.ones(25_000_000)
    grown = measure.resident() - before
    assert grown == pytest.approx(kept.nbytes, rel=0.05)
