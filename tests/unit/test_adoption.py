"""Which checkpoints count: those that are whole on storage and of the run, whatever Ray Train's list says."""

from __future__ import annotations

import json
import random
import shutil
import uuid

import pytest
import torch
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from raydistill.errors import StageFailed
from raydistill.storage.atomic import remove_folder
from raydistill.storage.place import Remote, for_ray_train, remote
from raydistill.workers import adoption
from raydistill.workers.adoption import adopt, checkpoint_folders, newest
from raydistill.workers.checkpoint import CheckpointError, about_of, check_state, load_state, save_state

LIST = "checkpoint_manager_snapshot.json"
RUN = ("mine",)


def write(folder, name, step, run="mine"):
    """One whole checkpoint."""
    place = folder / f"checkpoint_2026-01-{name}"
    place.mkdir(parents=True, exist_ok=True)
    save_state(place, {"weight": torch.full((4096,), float(step))}, {"step": step} | ({"run": run} if run else {}))
    return place


def cut(place):
    (place / "state.pt").write_bytes((place / "state.pt").read_bytes()[:-40])


def flip(place):
    content = bytearray((place / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "state.pt").write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """Of a stage, with two checkpoints and a list that names both."""
    folder = tmp_path / "checkpoints"
    write(folder, "01", 1)
    write(folder, "02", 2)
    adopt("distill", folder, RUN)
    return folder


def ray_reads(folder):
    """(name of the newest checkpoint, names of all) as Ray Train's controller would start with."""
    arguments = for_ray_train(folder.parent)
    storage = StorageContext(arguments["storage_path"], folder.name, arguments.get("storage_filesystem"))
    manager = CheckpointManager(CheckpointConfig(num_to_keep=2), storage)
    names = [result.checkpoint.path.rpartition("/")[2] for result in manager.best_checkpoint_results]
    latest = manager.latest_checkpoint_result
    return (latest and latest.checkpoint.path.rpartition("/")[2]), names


def names(folder):
    return [place.name for place in checkpoint_folders(folder)]


def test_a_list_that_names_what_is_there_is_left_alone(folder, capfd):
    before = (folder / LIST).read_bytes()
    capfd.readouterr()
    adopt("distill", folder, RUN)
    assert (folder / LIST).read_bytes() == before
    assert capfd.readouterr().out == ""
    assert ray_reads(folder) == ("checkpoint_2026-01-02", ["checkpoint_2026-01-01", "checkpoint_2026-01-02"])


def test_a_whole_checkpoint_that_the_list_does_not_name_is_adopted_and_the_oldest_goes(folder, capfd):
    """As after a kill between writing and reporting."""
    write(folder, "03", 3)
    adopt("distill", folder, RUN)
    assert ray_reads(folder) == ("checkpoint_2026-01-03", ["checkpoint_2026-01-02", "checkpoint_2026-01-03"])
    assert names(folder) == ["checkpoint_2026-01-02", "checkpoint_2026-01-03"]
    assert "does not name what is on storage: 2 found there; going on from checkpoint_2026-01-03, step 3" in (
        capfd.readouterr().out
    )


@pytest.mark.parametrize("damage", [cut, flip, lambda place: (place / "state.pt").unlink(), shutil.rmtree])
def test_an_orphan_that_is_not_whole_is_deleted(folder, damage, capfd):
    damage(write(folder, "03", 3))
    (folder / "checkpoint_2026-01-04").mkdir()  # nothing was written yet
    adopt("distill", folder, RUN)
    assert names(folder) == ["checkpoint_2026-01-01", "checkpoint_2026-01-02"]
    assert ray_reads(folder)[0] == "checkpoint_2026-01-02"
    assert f"{folder / 'checkpoint_2026-01-04'}: damaged or incomplete checkpoint" in capfd.readouterr().out


def test_of_a_damaged_one_that_the_list_names_the_one_before_it_counts(folder):
    flip(folder / "checkpoint_2026-01-02")
    adopt("distill", folder, RUN)
    assert ray_reads(folder) == ("checkpoint_2026-01-01", ["checkpoint_2026-01-01"])
    assert names(folder) == ["checkpoint_2026-01-01"]


def test_the_highest_step_counts_whatever_the_clocks_said(folder):
    """Names are dates of the node that wrote; another node's clock may be behind."""
    write(folder, "00", 3)
    adopt("distill", folder, RUN)
    assert ray_reads(folder)[0] == "checkpoint_2026-01-00"
    assert newest("distill", folder, RUN).about["step"] == 3


def test_an_unreadable_about_json_costs_no_whole_checkpoint(folder):
    (folder / "checkpoint_2026-01-02" / "about.json").write_bytes(b"\xff[")
    (folder / "checkpoint_2026-01-01" / "about.json").unlink()
    adopt("distill", folder, RUN)
    assert ray_reads(folder) == ("checkpoint_2026-01-02", ["checkpoint_2026-01-01", "checkpoint_2026-01-02"])


@pytest.mark.parametrize(("step", "run"), [(0, "mine"), (99, "mine"), (2, "another")])
def test_whatever_about_json_says_the_state_counts_whose_checksums_are_compared(folder, step, run):
    """A wrong step there once made the newest be deleted, or an older one win; a wrong run, ours be refused."""
    for name in ("01", "02"):
        (folder / f"checkpoint_2026-01-{name}" / "about.json").write_text(json.dumps({"step": step, "run": run}))
        write(folder, "03", 3)
        adopt("distill", folder, RUN)
        assert ray_reads(folder) == ("checkpoint_2026-01-03", ["checkpoint_2026-01-02", "checkpoint_2026-01-03"])
        assert newest("distill", folder, RUN).about["step"] == 3
        shutil.rmtree(folder / "checkpoint_2026-01-03")
        write(folder, "01", 1)
        adopt("distill", folder, RUN)
        assert names(folder) == ["checkpoint_2026-01-01", "checkpoint_2026-01-02"]
    about = json.dumps({"step": 4, "run": "mine"})
    (write(folder, "04", 4, "another") / "about.json").write_text(about)
    with pytest.raises(StageFailed, match="is a checkpoint of another run"):
        adopt("distill", folder, RUN)


def test_about_is_read_without_the_tensors_and_its_damage_is_found(folder):
    """A checkpoint may have 10 GB: a hole takes the place of the weights."""
    place = folder / "checkpoint_2026-01-02"
    content = bytearray((place / "state.pt").read_bytes())
    weights = content.index(torch.full((4096,), 2.0).numpy().tobytes())
    content[weights : weights + 4096 * 4] = bytes(4096 * 4)
    (place / "state.pt").write_bytes(content)
    assert about_of(place) == {"step": 2, "run": "mine"}
    at = content.index(b"mine")
    content[at : at + 4] = b"moon"
    (place / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{place}: damaged or incomplete checkpoint \(BadZipFile: Bad CRC"):
        about_of(place)


def reads(monkeypatch):
    """Names of the checkpoints that were read whole."""
    found, check = [], adoption.check_state
    monkeypatch.setattr(adoption, "check_state", lambda place: (found.append(place.name), check(place))[1])
    return found


def test_only_what_counts_is_read_whole(folder, monkeypatch):
    """They may have 10 GB, and lie in a bucket."""
    found = reads(monkeypatch)
    adopt("distill", folder, RUN)
    assert found == ["checkpoint_2026-01-02"]
    write(folder, "03", 3)
    adopt("distill", folder, RUN)  # the one before it is read too, since an older one goes
    assert found[1:] == ["checkpoint_2026-01-03", "checkpoint_2026-01-02"]
    assert names(folder) == ["checkpoint_2026-01-02", "checkpoint_2026-01-03"]
    flip(folder / "checkpoint_2026-01-03")
    adopt("distill", folder, RUN)
    assert found[3:] == ["checkpoint_2026-01-03", "checkpoint_2026-01-02"]
    assert names(folder) == ["checkpoint_2026-01-02"]


def test_of_three_the_damaged_one_goes_and_not_the_oldest(folder):
    flip(folder / "checkpoint_2026-01-02")
    write(folder, "03", 3)
    adopt("distill", folder, RUN)
    assert names(folder) == ["checkpoint_2026-01-01", "checkpoint_2026-01-03"]


def test_links_are_no_checkpoints_and_only_the_link_goes(folder, tmp_path, capfd):
    """To the newest (whose original once was deleted), to one elsewhere, and to nothing."""
    elsewhere = write(tmp_path / "elsewhere", "09", 9)
    for name, target in (("05", folder / "checkpoint_2026-01-02"), ("06", elsewhere), ("07", tmp_path / "nothing")):
        (folder / f"checkpoint_2026-01-{name}").symlink_to(target)
    assert newest("distill", folder, RUN).about["step"] == 2
    adopt("distill", folder, RUN)
    assert {path.name for path in folder.iterdir()} == {LIST, "checkpoint_2026-01-01", "checkpoint_2026-01-02"}
    assert ray_reads(folder)[0] == "checkpoint_2026-01-02"
    assert (elsewhere / "state.pt").is_file()
    assert f"{folder / 'checkpoint_2026-01-06'} is a link, and no checkpoint; it is deleted" in capfd.readouterr().out


def test_where_only_a_link_is_left_nothing_begins_anew(folder, tmp_path):
    (folder / "checkpoint_2026-01-02").rename(tmp_path / "moved")
    (folder / "checkpoint_2026-01-02").symlink_to(tmp_path / "moved")
    shutil.rmtree(folder / "checkpoint_2026-01-01")
    with pytest.raises(StageFailed, match="checkpoint_2026-01-02 is a link, and no checkpoint; none is left"):
        adopt("distill", folder, RUN)
    assert (folder / "checkpoint_2026-01-02").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "link", "link to nothing", "link to a folder"])
def test_what_takes_the_place_of_the_list_is_no_checkpoint_and_makes_room(folder, kind, tmp_path, capfd):
    content = (folder / LIST).read_bytes()
    for left in (2, 0):
        (folder / LIST).unlink(missing_ok=True)
        target = tmp_path / f"target of {left}"
        if kind == "folder":
            (folder / LIST / "full").mkdir(parents=True)
        else:
            (folder / LIST).symlink_to(target)
            target.write_bytes(content) if kind == "link" else target.mkdir() if kind.endswith("folder") else None
        if not left:
            for place in checkpoint_folders(folder):
                shutil.rmtree(place)
        adopt("distill", folder, RUN)
        assert not (folder / LIST).is_symlink()
        assert (folder / LIST).is_file() == bool(left)
        assert ray_reads(folder)[0] == ("checkpoint_2026-01-02" if left else None)
        assert target.exists() == (kind in ("link", "link to a folder"))
        assert f"{folder / LIST}, is a {kind.split(' to ')[0]}: " in capfd.readouterr().out


def damaged_lists(content: bytes) -> list[bytes]:
    """Cut, emptied, overwritten, and sound JSON that says something else."""
    rng, found = random.Random(0), [b"", b"\xff", b"[]", b"{}", b"null", b"[" * 10000]
    for _ in range(40):
        start = rng.randrange(len(content))
        found.append(content[:start])
        found.append(content[:start] + rng.randbytes(rng.randint(1, 40)) + content[start + 20 :])
        found.append(content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :])
    tree = json.loads(content)
    for key in tree:
        found.append(json.dumps({name: value for name, value in tree.items() if name != key}).encode())
        for value in (None, [], {}, 7, "x", -1, [3, 3], [{"checkpoint_dir_name": "checkpoint_x", "metrics": {}}]):
            found.append(json.dumps(tree | {key: value}).encode())
    return found


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.full)])
def test_whatever_the_list_says_the_newest_whole_checkpoint_is_where_ray_train_begins(folder, every):
    content = (folder / LIST).read_bytes()
    lists = damaged_lists(content)
    assert len(lists) > 200
    for text in [None, *lists[::every]]:
        (folder / LIST).unlink() if text is None else (folder / LIST).write_bytes(text)
        adopt("distill", folder, RUN)
        assert ray_reads(folder) == ("checkpoint_2026-01-02", ["checkpoint_2026-01-01", "checkpoint_2026-01-02"]), text


@pytest.mark.parametrize("other", ["another", None])
def test_a_checkpoint_of_another_run_is_refused_by_name_and_nothing_is_deleted(folder, other):
    place, before = write(folder, "03", 3, other), (folder / LIST).read_bytes()
    cut(write(folder, "04", 4))
    with pytest.raises(StageFailed, match=rf"{place} is a checkpoint of another run \({other or 'which'}"):
        adopt("distill", folder, RUN)
    assert len(names(folder)) == 4
    assert (folder / LIST).read_bytes() == before
    with pytest.raises(CheckpointError, match=f"{place} is a checkpoint of another run"):
        newest("distill", folder, RUN)
    adopt("distill", folder, ("mine", other))  # of a run that was begun before checkpoints had an id
    assert ray_reads(folder)[0] == "checkpoint_2026-01-03"


def test_a_state_of_another_run_below_an_about_json_of_this_one_is_refused(folder, tmp_path):
    shutil.copy(write(tmp_path, "05", 5, "another") / "state.pt", folder / "checkpoint_2026-01-02" / "state.pt")
    with pytest.raises(CheckpointError, match="is a checkpoint of another run"):
        newest("distill", folder, RUN)


def test_a_first_checkpoint_that_was_cut_is_no_reason_not_to_begin(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    adopt("distill", folder, RUN)
    assert not folder.exists()
    cut(write(folder, "01", 1))
    adopt("distill", folder, RUN)
    assert names(folder) == []
    assert "it is deleted" in capfd.readouterr().out
    assert ray_reads(folder) == (None, [])


def test_checkpoints_that_are_all_damaged_are_named_and_left(folder):
    for place in checkpoint_folders(folder):
        flip(place)
    with pytest.raises(StageFailed, match=f"distill: .*01: damaged.*none is left. Remove {folder} to begin again"):
        adopt("distill", folder, RUN)
    assert len(names(folder)) == 2


def test_without_a_list_several_damaged_ones_are_named_and_left_too(folder):
    """A first checkpoint that was cut short is one; of several, some had been reported."""
    (folder / LIST).unlink()
    for place in checkpoint_folders(folder):
        cut(place)
    with pytest.raises(StageFailed, match=f"01: damaged.*02: damaged.*none is left. Remove {folder} to begin again"):
        adopt("distill", folder, RUN)
    assert len(names(folder)) == 2


class Away(Remote):
    """A bucket whose store does not answer."""

    def download(self, target):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")


def test_a_store_that_is_away_is_no_damage(monkeypatch):
    monkeypatch.setattr(Away, "filesystem", None)
    for read in (about_of, check_state, load_state):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            read(Away("s3", "bucket/checkpoint_2026-01-01"))


def test_in_a_bucket_the_same_ones_count(bucket, folder, capfd, monkeypatch):
    far = remote(f"{bucket}/{uuid.uuid4().hex[:8]}") / "checkpoints"
    write(folder, "03", 3)
    flip(write(folder, "04", 4))
    far.upload(folder)
    adopt("distill", far, RUN)
    assert ray_reads(far) == ("checkpoint_2026-01-03", ["checkpoint_2026-01-02", "checkpoint_2026-01-03"])
    assert names(far) == ["checkpoint_2026-01-02", "checkpoint_2026-01-03"]
    assert f"{far / 'checkpoint_2026-01-04'}: damaged or incomplete" in capfd.readouterr().out
    (far / LIST).unlink()
    adopt("distill", far, RUN)
    assert ray_reads(far)[0] == "checkpoint_2026-01-03"
    assert torch.equal(newest("distill", far, RUN).state["weight"], torch.full((4096,), 3.0))
    with monkeypatch.context() as without:
        without.delattr(Remote, "download")
        assert about_of(far / "checkpoint_2026-01-03") == {"step": 3, "run": "mine"}, "of 10 GB a few kB are fetched"
    with pytest.raises(CheckpointError, match=f"{far / 'checkpoint_none'}: damaged or incomplete"):
        about_of(far / "checkpoint_none")
    (far / "checkpoint_2026-01-05").upload(write(folder, "05", 5, "another"))
    with pytest.raises(StageFailed, match="is a checkpoint of another run"):
        adopt("distill", far, RUN)
    remove_folder(far)
