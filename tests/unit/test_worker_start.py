"""How a worker begins: its texts while the device is empty, then its networks, and no checkpoint is kept."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raydistill.config.reading import load
from raydistill.data.encode import PromptTable
from raydistill.spaces import load_space
from raydistill.storage.resolve import resolve
from raydistill.workers import adoption, distill, observer
from raydistill.workers.stage import Stage


def test_a_worker_reads_texts_first_and_keeps_no_copy_of_the_checkpoint_that_it_went_on_from(monkeypatch):
    """It would lie in main memory for as long as the run; and the device is empty before networks are loaded."""
    weights = torch.zeros(3)
    state, seen = {"student": weights}, []
    gone = weakref.ref(weights)
    found = [adoption.Found(Path("checkpoint"), state, {"step": 3})]
    for name in ("open_reals", "batches_after"):
        monkeypatch.setattr(distill, name, lambda *_: (batch for batch in ()))
    monkeypatch.setattr(distill, "newest_state", lambda *_: found.pop())
    monkeypatch.setattr(distill.Worker, "current", lambda _: distill.Worker(0, 2, torch.device("cpu")))
    monkeypatch.setattr(distill, "evaluated_sets", lambda *_: seen.append("texts"))
    monkeypatch.setattr(distill, "load_distiller", lambda *_: seen.append("networks") or (None, None))
    metrics = SimpleNamespace(start=lambda: metrics, stop=lambda _: None)
    monkeypatch.setattr(distill, "SystemMetrics", lambda *_: metrics)
    run = SimpleNamespace(log=SimpleNamespace(close=lambda: None), close=lambda _: None)
    monkeypatch.setattr(distill, "DistillationRun", lambda *given, **_: seen.append(given[-1].about["step"]) or run)
    config = load()
    del weights, state
    nowhere = {"folder": "/nowhere", "mlflow_uri": "", "mlflow_run": ""}
    with distill._opened(Stage(name="distill", config=config.model_dump(), **nowhere), config):
        assert seen == ["texts", "networks", 3]
        assert gone() is None


@pytest.mark.parametrize("full", [False, True])
def test_rank_0_s_prompts_are_encoded_once_and_on_its_device(full, monkeypatch, capsys):
    config, loaded = load(overrides=["evaluation.count=70", "evaluation.periodic_count=3"]), []
    space = load_space(resolve(config.student.model))
    load_text = type(space).load_text

    def told(self, dtype):
        text = load_text(self, dtype)

        def to(device):
            loaded.append((dtype, device.type))
            if full and device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return text

        return SimpleNamespace(to=to)

    with monkeypatch.context() as patched:
        patched.setattr(type(space), "load_text", told)
        sets = observer.evaluated_sets(config, torch.device("cuda"))
    assert loaded == [(torch.float32, "cuda"), (torch.float32, "cpu")][: 1 + full]
    assert ("the CPU encodes its prompts" in capsys.readouterr().out) == full
    assert [len(fixed.captions) for fixed, _ in sets] == [70, 3]
    for fixed, table in sets:
        for name, column in PromptTable(space, fixed.captions).columns.items():
            assert torch.equal(table.columns[name], column), "not the bits of a table made on the CPU"
