"""Configurations that are doubled, endless, too large or unusable: one line, at once, before anything starts."""

from __future__ import annotations

import itertools
import typing

import pytest

from raydistill.config.reading import MOST_FILES, fields, from_yaml, load, to_yaml
from raydistill.config.yaml_text import MOST_CHARACTERS, MOST_LEVELS, MOST_VALUES, parse
from raydistill.driver.run_folder import open_run_folder
from raydistill.errors import InputError
from raydistill.planning.gpus import read_gpus
from raydistill.storage.resolve import check_storage


def refused(*overrides: str, file=None) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(InputError) as caught:
        open_run_folder(load(file, overrides))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


# -- keys twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "distill:\n  steps: 1\nvsd: {}\ndistill:\n  steps: 2\n",
            "line 4: key distill is there twice, first in line 1",
        ),
        ("distill:\n  steps: 1\n  'steps': 2\n", "line 3: key steps is there twice, first in line 2"),
        ("distill: {node_labels: {a: b, c: d, a: e}}\n", "line 1: key a is there twice"),
        ("distill:\n  steps: 1\n  ? steps\n  : 2\n", "line 3: key steps is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_line_in_every_file(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert refused(file=file).startswith(f"{file}: {message}")
    (tmp_path / "child.yaml").write_text("extends: mine.yaml\n")
    assert refused(file=tmp_path / "child.yaml").startswith(f"{file}: {message}")
    with pytest.raises(InputError, match="is there twice"):
        from_yaml(text)
    with pytest.raises(InputError, match=r"mine\.yaml: .*is there twice"):
        read_gpus(str(file))


def test_a_key_that_is_there_twice_in_an_override_is_named():
    assert refused("vsd={weight: 1, weight: 2}").startswith("vsd: line 1: key weight is there twice")


# -- aliases, depth, length -------------------------------------------------------------------------------


def laughs(levels: int = 9) -> str:
    """Ten to the power of `levels` values in a few hundred characters."""
    parts = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    parts += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "{" + ", ".join(parts) + "}"


def merged(levels: int = 30) -> str:
    """The same by merge keys."""
    parts = ["a0: &a0 {x: 1}"]
    parts += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    return "{" + ", ".join(parts) + "}"


@pytest.mark.parametrize("bomb", [laughs(), merged()], ids=["lists", "merges"])
def test_aliases_that_grow_without_end_are_refused_in_files_and_overrides(tmp_path, bomb):
    assert f"more than {MOST_VALUES} values" in refused(f"run.name={bomb}")
    assert f"more than {MOST_VALUES} values" in refused(f"vsd={bomb}")
    (tmp_path / "bomb.yaml").write_text(bomb)
    assert refused(file=tmp_path / "bomb.yaml").startswith(f"{tmp_path}/bomb.yaml: line 1: more than")


@pytest.mark.parametrize(
    "text",
    [
        "{vsd: &a {weight: *a}}",
        "{a0: &a0 {x: 1}, " + ", ".join(f"a{i}: &a{i} {{x: *a{i - 1}}}" for i in range(1, 2000)) + "}",
        "vsd: " + "[" * 5000 + "]" * 5000,
        "vsd: " + "{a: " * 100 + "1" + "}" * 100,
        "a: 1\n" * MOST_CHARACTERS,
        "\0",
    ],
    ids=["itself", "a chain of aliases", "very deep", "deep", "long", "NUL"],
)
def test_texts_without_end_are_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    assert refused(file=tmp_path / "mine.yaml").startswith(f"{tmp_path}/mine.yaml: ")


def test_ordinary_aliases_and_merges_are_read(tmp_path):
    text = "distill: {node_labels: &spot {pool: spot}, steps: 7}\nteachers: {node_labels: *spot}\n"
    (tmp_path / "mine.yaml").write_text(text + "prompts: {node_labels: {<<: *spot, pool: own}}\n")
    config = load(tmp_path / "mine.yaml")
    assert config.distill.node_labels == config.teachers.node_labels == {"pool": "spot"}
    assert config.prompts.node_labels == {"pool": "own"}
    assert parse("[" * MOST_LEVELS + "]" * MOST_LEVELS, "x") is not None


@pytest.mark.parametrize(
    "override",
    [
        "run.name=!!int x", "run.name=!!timestamp x", "run.name=!!python/object:os.system x", "run.name=*unknown",
        "run.seed=" + "9" * 5000, "run.seed=0x" + "f" * 5000, "student.lr=0x" + "f" * 5000, "vsd={1: 2}",
        "vsd={[1]: 2}", ".".join(["a"] * 3000) + "=1", "run.name=", "storage=", "storage= ",
    ],
)  # fmt: skip
def test_values_that_cannot_be_read_are_one_line(override):
    refused(override)


def test_an_override_without_a_value_is_no_null():
    """As a variable of the shell that is not set."""
    assert refused("run.name=") == "run.name: there is nothing after the ="
    assert load(overrides=["run.name=null"]).run.name is None


def test_hundreds_of_mistakes_are_told_in_few_lines():
    with pytest.raises(InputError, match="and 280 more mistakes") as caught:
        load(overrides=["vsd={" + ", ".join(f"k{i}: 1" for i in range(300)) + "}"])
    assert len(str(caught.value).splitlines()) == 21


# -- extends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["extends: {}.yaml", "extends: [{0}.yaml, {0}.yaml]"], ids=["deep", "doubling"])
def test_files_that_extend_each_other_without_end_are_refused(tmp_path, line):
    for i in range(1200):
        (tmp_path / f"{i}.yaml").write_text(line.format(i + 1))
    (tmp_path / "1200.yaml").write_text("")
    assert refused(file=tmp_path / "0.yaml").startswith(f"{tmp_path}/0.yaml: extends more than {MOST_FILES} files")


def test_many_files_may_extend_each_other(tmp_path):
    for i in range(MOST_FILES - 1):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    (tmp_path / f"{MOST_FILES - 1}.yaml").write_text("distill: {steps: 7}\n")
    assert load(tmp_path / "0.yaml").distill.steps == 7


def test_a_longer_circle_is_named(tmp_path):
    for one, other in itertools.pairwise("abca"):
        (tmp_path / f"{one}.yaml").write_text(f"extends: {other}.yaml\n")
    assert "which extends it" in refused(file=tmp_path / "a.yaml")


# -- numbers ----------------------------------------------------------------------------------------------


def numbers(annotation) -> set[type]:
    parts = [numbers(part) for part in typing.get_args(annotation) if not isinstance(part, str)]
    return {annotation} & {int, float} if not parts else set().union(*parts)


def test_no_whole_number_is_taken_beyond_64_bits_and_no_size_of_1e18():
    kinds = {key: numbers(field.annotation) for key, field, _ in fields()}
    whole = [key for key, found in kinds.items() if int in found]
    assert {"distill.batch_size", "run.seed", "bridge.depths", "teachers.min_replicas"} < set(whole)
    for key in whole:
        wrong = [1 << 63, -(1 << 63) - 1, *([] if key.endswith("seed") else [10**18])]
        for value in wrong:
            text = [value] if key == "bridge.depths" else value
            assert refused(f"{key}={text}").startswith(key)


@pytest.mark.parametrize("key", ["teachers.cpus_per_rank", "distill.gpus_per_worker", "teachers.retry_for_s"])
def test_resources_and_seconds_have_an_end_too(key):
    assert refused(f"{key}=1e18").startswith(f"{key}: ")


def test_the_batch_of_the_report_is_refused():
    assert refused("distill.batch_size=1e18") == (
        "distill.batch_size: Input should be less than or equal to 65536 (got 1e+18)"
    )


# -- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["''", "a..", "a.", "a..b", "..", ".a", "-a", "a/b", "a b", "é", "a" * 101, "mlflow.db", "mlflow.db.lock",
             "MLartifacts", "downloads", '"a\\n"', '"a\\0"'],
)  # fmt: skip
def test_names_that_are_no_folder_service_and_run_are_refused(name):
    assert refused(f"run.name={name}").startswith("run.name: ")


@pytest.mark.parametrize("name", ["2024", "no", "null", "1e5", "0x10", "true"])
def test_a_name_that_reads_as_something_else_is_usable_in_quotes(tmp_path, name):
    config = load(overrides=[f"storage={tmp_path}", f'run.name="{name}"'])
    assert config.run.name == name
    assert from_yaml(to_yaml(config)) == config
    assert open_run_folder(config).path == tmp_path.resolve() / name


@pytest.mark.parametrize("name", ["2024", "no", "1e5", "0x10", "12:30", "20240101_120000"])
def test_without_quotes_the_message_tells_how_to_quote(name):
    assert "needs quotes of its own: 'run.name=\"…\"'" in refused(f"run.name={name}")


def test_a_date_is_a_name_as_it_stands():
    for name in ("2024-01-31", "2024-13-45"):
        config = load(overrides=[f"run.name={name}"])
        assert config.run.name == name
        assert from_yaml(to_yaml(config)) == config


def test_a_label_whose_name_is_no_text_is_shown_and_quotes_are_advised():
    for name in (1, 1.5, -2):
        assert refused(f"distill.node_labels={{{name}: a}}") == (
            f"distill.node_labels.{name}: a name must be a text, not {name}; give it quotes of its own"
        )
    assert load(overrides=['distill.node_labels={"1": a}']).distill.node_labels == {"1": "a"}


# -- mappings ---------------------------------------------------------------------------------------------


def test_an_empty_mapping_clears_labels_and_no_section(tmp_path):
    (tmp_path / "mine.yaml").write_text("teachers: {shards: 3, node_labels: {pool: spot}}\n")
    (tmp_path / "child.yaml").write_text("extends: mine.yaml\nteachers: {node_labels: {}}\n")
    for config in (
        load(tmp_path / "mine.yaml", ["teachers.node_labels={}"]),
        load(tmp_path / "mine.yaml", ["teachers={node_labels: {}}"]),
        load(tmp_path / "child.yaml"),
    ):
        assert (config.teachers.shards, config.teachers.node_labels) == (3, {})
    kept = load(tmp_path / "mine.yaml", ["teachers={}", "teachers.node_labels.zone=a"])
    assert (kept.teachers.shards, kept.teachers.node_labels) == (3, {"pool": "spot", "zone": "a"})


# -- places -----------------------------------------------------------------------------------------------


def test_a_storage_that_can_be_no_folder_is_one_line(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    (tmp_path / "file").write_text("")
    for wrong in ("one", "one/below", "file", "file/below", "x" * 300):
        for prefix in ("", "file://"):
            message = refused(f"storage={prefix}{tmp_path / wrong}")
            assert message.startswith("storage: ")
            assert "name another one" in message
    assert refused("storage=~nobody-of-this-name/x").startswith("storage: ~nobody-of-this-name/x: ")
    assert "null byte" in refused('storage="a\\0"')


def test_a_storage_that_is_not_there_yet_is_taken(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later")
    for right in (tmp_path / "new" / "below", tmp_path):
        assert check_storage(load(overrides=[f"storage={right}"])) == right.resolve()
    assert check_storage(load(overrides=[f"storage={tmp_path}/link/x"])) == tmp_path.resolve() / "later" / "x"


def test_a_folder_where_a_file_belongs_and_the_reverse_are_named_with_advice(tmp_path):
    (tmp_path / "mine" / "config.yaml").mkdir(parents=True)
    (tmp_path / "yours").write_text("")
    at = f"storage={tmp_path}"
    assert refused(at, "run.name=mine") == (
        f"{tmp_path}/mine/config.yaml is a folder, and a run keeps its configuration there: remove it, or use another "
        "run.name"
    )
    assert refused(at, "run.name=yours").endswith("is a file, not a run's folder; use another run.name")
    assert refused(file=tmp_path) == f"--config {tmp_path}: is a folder; name a file in it"
    assert "File name too long" in refused(file=tmp_path / ("x" * 300))


def test_a_configuration_with_foreign_bytes_is_named(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_bytes(b"run: {name: \xff}")
    assert "mine/config.yaml is damaged" in refused(f"storage={tmp_path}", "run.name=mine")
    assert "not UTF-8" in refused(file=tmp_path / "mine" / "config.yaml")
