"""Checkpoint files: an interrupted write costs nothing, damage is named, and no file can run code."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from raydistill.workers.checkpoint import CheckpointError, load_state, require_room, save_state


def state(value: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "updates": 3,
        "student": {"weight": torch.full((64, 64), value), "bias": torch.randn(64, generator=generator)},
        "optimizers": {"student": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.0, 0.9)}]}},
    }


def test_a_state_comes_back_with_the_same_bits(tmp_path):
    save_state(tmp_path, state(1.0), {"step": 3, "best": 0.25})
    found, about = load_state(tmp_path)
    assert about == {"step": 3, "best": 0.25}
    assert torch.equal(found["student"]["weight"], torch.full((64, 64), 1.0))
    assert torch.equal(found["student"]["bias"], state(1.0)["student"]["bias"])
    assert found["optimizers"]["student"]["param_groups"] == [{"betas": (0.0, 0.9)}]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_older_state(tmp_path, monkeypatch, failure):
    save_state(tmp_path, state(1.0), {"step": 1})
    write = torch.save

    def half(value, file, *more, **options):
        write(value, file, *more, **options)
        size = Path(file).stat().st_size
        os.truncate(file, size // 2)
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(failure)):
        save_state(tmp_path, state(2.0), {"step": 2})
    found, about = load_state(tmp_path)
    assert about == {"step": 1}
    assert torch.equal(found["student"]["weight"], torch.full((64, 64), 1.0))

    monkeypatch.undo()
    save_state(tmp_path, state(3.0), {"step": 3})  # whatever the interrupted write left behind
    found, about = load_state(tmp_path)
    assert about == {"step": 3}
    assert torch.equal(found["student"]["weight"], torch.full((64, 64), 3.0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named_and_leaves_the_older_state(tmp_path):
    save_state(tmp_path, state(1.0), {"step": 1})
    (tmp_path / ".new.state.pt").symlink_to("/dev/full")  # every write to it fails, as on a full disk
    with pytest.raises(
        OSError, match=r"state.pt cannot be written .* is the disk full\? .* GiB are free. The older one"
    ):
        save_state(tmp_path, state(2.0), {"step": 2})
    assert load_state(tmp_path)[1] == {"step": 1}
    save_state(tmp_path, state(3.0), {"step": 3})
    assert load_state(tmp_path)[1] == {"step": 3}


def test_a_checkpoint_without_room_is_refused_before_it_is_written(tmp_path):
    require_room(tmp_path, 1 << 10)
    with pytest.raises(OSError, match=f"does not fit.*{tmp_path}") as caught:
        require_room(tmp_path, 1 << 60)
    assert caught.value.errno == errno.ENOSPC


def saved_bytes(folder: Path) -> bytes:
    save_state(folder, state(1.0), {"step": 1})
    return (folder / "state.pt").read_bytes()


def assert_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_state(folder)
    assert str(folder) in str(error.value)
    assert "damaged or incomplete" in str(error.value)


def test_a_truncated_state_is_refused_by_name(tmp_path):
    content = saved_bytes(tmp_path)
    for length in (0, 1, 2, 3, 4, 5, 8, 16, 64, 200, *range(300, len(content), 997), len(content) - 1):
        (tmp_path / "state.pt").write_bytes(content[:length])
        assert_refused(tmp_path)


def test_overwritten_states_are_refused_by_name(tmp_path):
    """The head, the directory at the end, or everything replaced by noise."""
    content = saved_bytes(tmp_path)
    rng = random.Random(0)
    for _ in range(100):
        noise = rng.randbytes(rng.randint(1, 300))
        for damaged in (noise, noise + content[len(noise) :], content[: -len(noise) - 22] + noise):
            (tmp_path / "state.pt").write_bytes(damaged)
            assert_refused(tmp_path)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """The weights are most of the file, so most flips hit them."""
    content, rng, refused = saved_bytes(tmp_path), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "state.pt").write_bytes(damaged)
        try:
            found, about = load_state(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        assert about == {"step": 1}
        assert torch.equal(found["student"]["weight"], torch.full((64, 64), 1.0))
        assert torch.equal(found["student"]["bias"], state(1.0)["student"]["bias"])
        assert torch.equal(found["optimizers"]["student"]["state"][0]["step"], torch.tensor(3.0))
    assert refused > 50


@pytest.mark.parametrize(
    "content", [{"student": {}}, {"state": {}}, [1, 2], torch.zeros(()), None, 7, "state"], ids=lambda value: str(value)
)
def test_a_torch_file_of_something_else_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    assert_refused(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, ""), MemoryError()])
def test_what_a_disk_refuses_once_is_no_damage(tmp_path, monkeypatch, error):
    saved_bytes(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr("zipfile.ZipFile.testzip", fail)
    with pytest.raises(type(error)) as caught:
        load_state(tmp_path)
    assert caught.value is error


def test_a_missing_state_is_refused_by_name(tmp_path):
    assert_refused(tmp_path)
    assert_refused(tmp_path / "nowhere")
    (tmp_path / "state.pt").mkdir()
    assert_refused(tmp_path)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle"])
def test_a_malicious_state_is_refused_and_never_executed(tmp_path, kind):
    evidence = tmp_path / "executed"
    content = {"state": {"student": Malicious(evidence)}, "about": {"step": 1}}
    if kind == "pickle":
        (tmp_path / "state.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "state.pt", _use_new_zipfile_serialization=kind == "torch")
    assert_refused(tmp_path)
    assert not evidence.exists()
    if kind == "pickle":
        pickle.loads((tmp_path / "state.pt").read_bytes())
    else:
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert evidence.exists(), "the file is harmless, so this test shows nothing"
