"""Counts on disk: what they depend on, what a second plan reads, and what becomes of damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.config.reading import fields, load
from raydistill.config.schema import Config, Section
from raydistill.planning import counting, kept
from raydistill.planning.counts import FIELDS, Wanted, wanted
from raydistill.shapes import WEIGHTS
from raydistill.spaces import FAMILIES
from raydistill.storage.staging import cache_folder

SETTINGS = ["distill.batch_size=4", "bridge.checkpoint=null", "teachers.slice=4"]
QUICK = ("network", "text", "vae", "models")


def file_of(field: str, *overrides: str) -> Path:
    config = load(overrides=[*SETTINGS, *overrides])
    return kept._file(wanted(config, [field])[field], kept._surroundings())


# -- reading and writing ----------------------------------------------------------------------------------


@pytest.fixture
def uncounted(monkeypatch):
    """Counting fails from here on."""

    def start():
        def never(*args):
            raise AssertionError("counted")

        monkeypatch.setattr(counting, "count", never)

    return start


def test_the_second_time_nothing_is_counted_and_everything_is_the_same(capsys, uncounted):
    config = load(overrides=SETTINGS)
    first = kept.find_counts(config, QUICK)
    told = capsys.readouterr().out
    assert "counting: step 0/4, torch and diffusers are loaded" in told
    assert f"kept for the next time in {cache_folder() / 'counts'}" in told
    uncounted()
    varied = load(overrides=[*SETTINGS, "distill.steps=7", "plan.trainer_gpu=4090", "synthesis.count=9", "storage=/x"])
    assert kept.find_counts(varied, QUICK) == first
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="counted"):
        kept.find_counts(load(overrides=[*SETTINGS, "teachers.slice=2"]), QUICK)


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def one_digit_changed(file: Path) -> None:
    text = file.read_text()
    at = text.index('"parameters":') + len('"parameters":')
    file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def another_count(file: Path) -> None:
    shutil.copy(next(file.parent.glob("text-*.json")), file)


def no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [shortened, one_digit_changed, another_count, no_text, folder_in_its_place])
def test_a_damaged_file_is_counted_anew_with_a_line(damage, capsys):
    config = load(overrides=SETTINGS)
    first = kept.find_counts(config, ["network", "text"])
    file = file_of("network")
    damage(file)
    capsys.readouterr()
    assert kept.find_counts(config, ["network", "text"]) == first
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert str(file) in line
    if damage is not folder_in_its_place:
        assert kept._read(file, "teacher") == first["network"], "the whole one has taken its place"


def test_a_cache_that_cannot_be_written_costs_a_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYDISTILL_CACHE", str(tmp_path / "file"))
    found = kept.find_counts(load(overrides=SETTINGS), ["models"])
    assert found["models"].teacher == "FluxPipeline"
    assert "cannot be written" in capsys.readouterr().out


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("RAYDISTILL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "raydistill"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    assert cache_folder() == tmp_path / ".cache" / "raydistill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "raydistill"
    monkeypatch.setenv("RAYDISTILL_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


# -- what a count depends on ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("trainer", "distill.micro_batches=2"),
        ("trainer", "distill.mixed_precision=true"),
        ("trainer", "distill.workers=2"),
        ("trainer", "fake_score.rank=4"),
        ("trainer", "bridge.embed_dim=60"),
        ("trainer", "student.ema_decay=0.9"),
        ("trainer", "teacher.model=shapes:sd3"),
        ("small_trainer", "distill.batch_size=8"),
        ("network", "teachers.dtype=bfloat16"),
        ("network", "teacher.guidance_scale=1"),
        ("text", "synthesis.teacher=shapes:sd3"),
        ("models", "synthesis.teacher=shapes:sd3"),
        ("bridge", "bridge.batch_size=8"),
        ("bridge", "bridge.steps=3"),  # a schedule of its step reads it
        ("text", "student.model=shapes:sd21"),
        ("models", "student.unet=null"),
        ("models", "distill.micro_batches=2"),
    ],
)
def test_what_changes_a_count_names_another_file(field, changes):
    assert file_of(field, changes) != file_of(field)


@pytest.mark.parametrize(
    "changes",
    ["distill.steps=9", "plan.efficiency=0.5", "synthesis.count=5", "teachers.replicas=3", "evaluation.count=2",
     "prompts.path=/elsewhere", "run.name=mine", "storage=/elsewhere", "distill.gpus_per_worker=1"],
)  # fmt: skip
def test_what_changes_no_count_names_the_same_files(changes):
    around = kept._surroundings()
    plain, varied = (load(overrides=[*SETTINGS, *more]) for more in ([], [changes]))
    files = [[kept._file(it, around) for it in wanted(config).values()] for config in (plain, varied)]
    assert files[0] == files[1]
    assert len(set(files[0])) == len(FIELDS) - 3  # the teacher itself draws, and the trainer keeps its activations


def test_a_changed_model_bridge_library_or_line_of_code_is_counted_anew(tmp_path, monkeypatch):
    model, bridge, code = (tmp_path / name for name in ("model", "bridge", "code"))
    shutil.copytree(WEIGHTS / "flux", model)
    shutil.copytree(WEIGHTS / "bridge/sd15-flux", bridge)
    (code / "room").mkdir(parents=True)
    (code / "room" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(kept.raydistill, "__file__", str(code / "__init__.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])

    def name() -> Path:
        return file_of("trainer", f"teacher.model={model}", f"bridge.checkpoint={bridge}")

    names = [name()]
    for file in (model / "transformer" / "config.json", bridge / "bridge.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"more": 1}))
        names.append(name())
    (code / "room" / "a.py").write_text("x = 2\n")
    names.append(name())
    (tmp_path / "site" / "apex-1.0.dist-info").mkdir(parents=True)
    names.append(name())
    (tmp_path / "site" / "apex-1.0.dist-info").rename(tmp_path / "site" / "apex-1.1.dist-info")
    names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[-1]


def test_a_family_from_outside_counts_with_its_own_code(tmp_path, monkeypatch):
    file = tmp_path / "outside_family.py"
    file.write_text("class Outside:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = kept._surroundings()
    monkeypatch.setitem(FAMILIES, "OutsidePipeline", type("Outside", (), {"__module__": "outside_family"}))
    with_it = kept._surroundings()
    file.write_text("class Outside:\n    changed = True\n")
    assert len({json.dumps(around) for around in (before, with_it, kept._surroundings())}) == 3
    monkeypatch.setitem(FAMILIES, "OutsidePipeline", type("Outside", (), {"__module__": "nowhere_to_be_found"}))
    assert kept._surroundings() is None, "code that no file holds: nothing is kept"
    assert kept._file(Wanted("text", load()), None) is None


def sections(section: type[Section] = Config, prefix: str = ""):
    yield section, prefix
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{prefix}{name}.")


RATES = {
    "discriminator.ramp_steps": 9,
    "distill.warmup_steps": 7,
    "distill.non_finite_share": 0.5,
    "distill.schedule": "cosine",
}


@pytest.mark.parametrize(
    "field", [*QUICK, "drawer", "bridge", pytest.param("trainer", marks=pytest.mark.full)]
)  # fmt: skip
def test_a_count_reads_no_key_that_its_file_does_not_depend_on(field, monkeypatch):
    settings = ["bridge.trainable=true", "student.ema_decay=0.9", "distill.workers=2", "bridge.batch_size=4"]
    settings += ["synthesis.teacher=shapes:sd3"] if field == "drawer" else []
    asked = wanted(load(overrides=[*SETTINGS, *settings]))[field]
    prefixes, leaves, seen = dict(sections()), {key for key, *_ in fields()}, set()
    plain = Section.__getattribute__

    def watched(self, name):
        key = f"{prefixes.get(type(self), '')}{name}"
        if key in leaves:
            seen.add(key)
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", watched)
    found = counting.count(asked)
    monkeypatch.undo()
    assert {"student.model", "teacher.model"} <= seen
    unread = {key: value for key, value in RATES.items() if field == "trainer"}  # read for numbers that no count has
    assert [key for key in sorted(seen) if not kept.reads(asked.kind, key)] == sorted(unread)
    if unread:
        others = [f"{key}={value}" for key, value in unread.items()]
        assert counting.count(wanted(load(overrides=[*SETTINGS, *settings, *others]))[field]) == found


def test_every_field_has_a_kind_that_can_be_kept():
    config = load(overrides=[*SETTINGS, "synthesis.teacher=shapes:sd3"])
    of_a_trainer_that_recomputes = {"keeping", "small_keeping"}
    assert set(wanted(config)) == set(FIELDS) - of_a_trainer_that_recomputes
    recomputing = load(overrides=[*SETTINGS, "synthesis.teacher=shapes:sd3", "distill.gradient_checkpointing=true"])
    assert set(wanted(recomputing)) == set(FIELDS) - {"recomputing"}
    assert {it.kind for it in wanted(config).values()} == set(kept.READ) == set(kept.TYPES)
    assert set(kept.NAMES) == set(FIELDS)
    keys = {key for key, *_ in fields()}
    assert set(kept.UNREAD) <= keys
    assert [part for part in sum(kept.READ.values(), ()) if not any(key.startswith(part) for key in keys)] == []


def test_a_plan_of_kept_counts_needs_no_torch():
    code = (
        "import sys, raydistill.commands.plan, raydistill.planning.gpus, raydistill.planning.kept as kept, "
        "raydistill.planning.report, raydistill.planning.verdict; from raydistill.planning.counts import wanted; "
        "from raydistill.config.reading import load; "
        "[kept._file(it, kept._surroundings()) for it in wanted(load('sdxl_sd15')).values()]; "
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
