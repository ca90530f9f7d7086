"""Prompt files: what is accepted, what is refused and how it is said, and the endless order."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lanes import full_but

from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.data.texts import CHUNK, Numbers, Texts, holds_text, permutation, repeated, undecoded
from raydistill.errors import InputError


def write(folder, name: str, content: bytes):
    file = folder / name
    file.write_bytes(content)
    return file


# -- formats ------------------------------------------------------------------------------------------


def test_text_keeps_duplicates_and_numbers_rows_by_line(tmp_path):
    file = write(tmp_path, "p.txt", b"\xef\xbb\xbfa cat\r\n\n  a dog \n\xff\xfe bad\na cat\nlonger than ten\nfin")
    prompts = read_prompts(file, max_characters=10)
    assert prompts.prompts == ["a cat", "a dog", "a cat", "fin"]
    assert prompts.ids.dtype == np.int64
    assert prompts.ids.tolist() == [1, 3, 5, 7]
    report = prompts.report
    assert (report.rows, report.good, report.duplicates) == (7, 4, 1)
    assert report.bad == {"blank": 1, "not valid UTF-8": 1, "longer than 10 characters": 1}
    assert report.first_bad == {"blank": [2], "not valid UTF-8": [4], "longer than 10 characters": [6]}
    assert "4 prompts of 7 rows, 1 repeated" in str(report)
    assert "1 blank (row 2)" in str(report)


def test_unicode_line_separators_do_not_split_a_prompt(tmp_path):
    file = write(tmp_path, "p.txt", "one\u2028still one\x0bstill one\ntwo".encode())
    assert read_prompts(file).ids.tolist() == [1, 2]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_number_rows_by_their_first_line(tmp_path, suffix, delimiter):
    d = delimiter.encode()
    content = b"id" + d + b"text\n1" + d + b'"two\nlines"\n2\n3' + d + b"\n\n4" + d + b"\xff\n5" + d + b"na\xc3\xafve\n"
    prompts = read_prompts(write(tmp_path, f"p.{suffix}", content), column="text")
    assert prompts.prompts == ["two\nlines", "naïve"]
    assert prompts.ids.tolist() == [2, 8]
    assert prompts.report.first_bad == {"without 'text'": [4], "blank": [5, 6], "not valid UTF-8": [7]}


def test_oversized_quoted_field_costs_one_row_not_the_file(tmp_path):
    content = b'prompt\nfirst\n"' + b"x" * (2 << 20) + b'"\nlast\n'
    prompts = read_prompts(write(tmp_path, "p.csv", content))
    assert prompts.prompts[0] == "first"
    assert prompts.prompts[-1] == "last"
    assert prompts.report.bad["malformed"] >= 1


def test_jsonl_counts_every_kind_of_bad_row(tmp_path):
    lines = [
        '{"prompt": "a cat"}',
        "{broken",
        '["a list"]',
        '{"caption": "other key"}',
        '{"prompt": null}',
        '{"prompt": 7}',
        '{"prompt": "\\ud800 lone surrogate"}',
        "",
        '{"prompt": "na\\u00efve"}',
        "[" * 100_000,
    ]
    file = write(tmp_path, "p.jsonl", "\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    prompts = read_prompts(file)
    assert prompts.prompts == ["a cat", "naïve"]
    assert prompts.ids.tolist() == [1, 9]
    assert prompts.report.first_bad == {
        "not JSON": [2, 10],
        "not a JSON object": [3],
        "without 'prompt'": [4],
        "null": [5],
        "not a string": [6],
        "not valid UTF-8": [7, 11],
        "blank": [8],
    }


def test_parquet_reads_row_by_row_even_when_one_string_is_undecodable(tmp_path):
    raw = pa.array([b"a cat", None, b"\xff\xfe", b" ", b"na\xc3\xafve"], pa.binary())
    strings = pa.StringArray.from_buffers(5, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0], raw.null_count)
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": strings, "other": [1, 2, 3, 4, 5]}), file)
    prompts = read_prompts(file)
    assert prompts.prompts == ["a cat", "naïve"]
    assert prompts.ids.tolist() == [1, 5]
    assert prompts.report.bad == {"null": 1, "not valid UTF-8": 1, "blank": 1}


def test_parquet_dictionary_column(tmp_path):
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["b", "a", "b"]).dictionary_encode()}), file)
    assert read_prompts(file).prompts == ["b", "a", "b"]


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.binary(), pa.binary(9)], ids=str
)
def test_parquet_columns_of_every_type_that_holds_text(tmp_path, kind):
    file = tmp_path / "p.parquet"
    pq.write_table(
        pa.table(
            {
                "prompt": pa.array([b"a red cup", None, b"a red \xff-\xff"], pa.binary()).cast(pa.binary(9))
                if kind == pa.binary(9)
                else pa.array(["a red cup", None, "na\u00efve"]).cast(kind)
            }
        ),
        file,
    )
    assert pq.read_schema(file).field("prompt").type == kind
    prompts = read_prompts(file)
    assert prompts.prompts[0] == "a red cup"
    assert prompts.report.first_bad["null"] == [2]


def test_a_dictionary_of_views_is_unpacked():
    plain = pa.array(["b", "a", None, "b"]).dictionary_encode()
    views = pa.DictionaryArray.from_arrays(plain.indices, plain.dictionary.cast(pa.string_view()))
    assert holds_text(views.type)
    assert undecoded(pa.chunked_array([views, views[:1]])) == [b"b", b"a", None, b"b", b"b"]


def test_only_the_first_bad_rows_are_named(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", b"\n" * 20 + b"good\n"))
    assert prompts.report.bad == {"blank": 20}
    assert prompts.report.first_bad == {"blank": [1, 2, 3, 4, 5]}
    assert "20 blank (rows 1, 2, 3, 4, 5, …)" in str(prompts.report)


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "empty"),
        ("p.txt", b"\n\n", r"no usable prompt in 2 rows: 2 blank \(rows 1, 2\)"),
        ("p.doc", b"x", "unknown suffix '.doc'.*parquet"),
        ("p.csv", b"id,text\n1,x\n", "no column 'prompt'.*'id', 'text'"),
        ("p.csv", b"prompt\n", "no rows"),
        ("p.jsonl", b'{"text": "x"}\n{"id": 3}\n', "no column 'prompt'.*'text', 'id'"),
        ("p.parquet", b"not parquet at all", "not a parquet file"),
    ],
)
def test_unusable_file_is_refused_by_name_and_reason(tmp_path, name, content, said):
    with pytest.raises(InputError, match=said) as error:
        read_prompts(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match="folder"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(("column", "said"), [("number", "holds int64, not strings"), ("none", "no column 'none'")])
def test_parquet_column_must_be_there_and_hold_strings(tmp_path, column, said):
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"number": [1]}), file)
    with pytest.raises(InputError, match=said):
        read_prompts(file, column=column)


def test_fail_names_the_first_bad_row(tmp_path):
    file = write(tmp_path, "p.jsonl", b'{"prompt": "good"}\n{"prompt": null}\n{bad\n')
    with pytest.raises(InputError, match="p.jsonl, row 2: null"):
        read_prompts(file, on_bad_row="fail")


# -- order --------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation_and_depends_on_seed_and_epoch_only():
    prompts = PromptSet([str(i) for i in range(101)])
    orders = {(seed, epoch): prompts.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(sorted(order.tolist()) == list(range(101)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert (pickle.loads(pickle.dumps(prompts)).order(1, 2) == orders[1, 2]).all()


def test_any_positions_can_be_read_in_any_grouping():
    prompts = PromptSet([f"p{i}" for i in range(7)], ids=range(100, 107))
    ids, texts = prompts.at(5, np.arange(21))
    for epoch in range(3):  # no position is lost at the seams
        assert sorted(ids[7 * epoch : 7 * epoch + 7]) == list(range(100, 107))
    assert texts == [f"p{i - 100}" for i in ids]
    some = np.array([20, 3, 3, 11])
    assert prompts.at(5, some)[0].tolist() == ids[some].tolist()
    assert prompts.at(5, 10**12 + np.arange(2))[0].shape == (2,)
    with pytest.raises(ValueError, match="negative"):
        prompts.at(5, [-1])


def test_order_cannot_be_spoilt_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        PromptSet(["a", "b"]).order(0, 0)[0] = 1


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        PromptSet([])


def test_json_escapes_of_a_written_file_come_back(tmp_path):
    texts = ['quote " comma , tab \t end', "emoji \U0001f680", "back\\slash"]
    file = write(tmp_path, "p.jsonl", "\n".join(json.dumps({"prompt": text}) for text in texts).encode())
    assert read_prompts(file).prompts == texts


# -- on disk ------------------------------------------------------------------------------------------

# reads as many prompts as the file has with a few MiB more than Python, numpy and pyarrow take, or fails
FRUGAL = """
import re, resource, sys
import numpy as np
import pyarrow.parquet
from raydistill.data.prompts import PromptSet, read_prompts

np.random.Generator(np.random.Philox(0)).permutation(9)
small = read_prompts(sys.argv[1] + "/small" + sys.argv[2])
small.at(0, range(5))
data = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + (int(sys.argv[3]) << 20),) * 2)
prompts = read_prompts(sys.argv[1] + "/large" + sys.argv[2])
for epoch in range(6):
    prompts.at(0, range(epoch * len(prompts), epoch * len(prompts) + 64))
assert sum(1 for _ in prompts.prompts) == len(prompts) and len(prompts.order(0, 0)) == len(prompts)
print(len(prompts), prompts.report.duplicates)
"""


@pytest.mark.parametrize("suffix", full_but([".txt", ".csv", ".tsv", ".jsonl", ".parquet"], ".jsonl", ".parquet"))
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    rows, room = 300_000, 16  # MiB; a .tsv with open marks takes 7 to 8, a list of the prompts 57
    for name, count in (("small", 10), ("large", rows)):
        file = tmp_path / f"{name}{suffix}"
        texts = [f"a photograph of thing number {i // 2}, oil on canvas, highly detailed" for i in range(count)]
        if suffix == ".parquet":
            pq.write_table(pa.table({"prompt": texts}), file, row_group_size=10_000)
        elif suffix == ".jsonl":
            file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
        else:
            rows_of = {".txt": texts, ".csv": ["prompt", *(f'"{text}"' for text in texts)], ".tsv": ["prompt", *texts]}
            rows_of[".tsv"][1:3] = [f'"{text}' for text in texts[:2]]  # never closed
            ends = "\r" if suffix == ".txt" else "\n"  # without one \n in the file
            file.write_bytes(ends.join(rows_of[suffix]).encode())
    command = [sys.executable, "-c", FRUGAL, str(tmp_path), suffix, str(room)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(rows), str(rows // 2)]


def test_a_full_disk_for_temporary_files_is_told_with_its_folder(tmp_path):
    file = write(tmp_path, "p.txt", b"a photograph of a thing\n" * 50_000)
    code = (
        "import resource, sys; from raydistill.data.prompts import read_prompts;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); read_prompts(sys.argv[1])"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    told = ended.stderr.strip().splitlines()[-1]
    assert told.startswith(f"raydistill.errors.InputError: {file}: no room for its prompts in {tmp_path} (")
    assert told.endswith("make some, or name another folder in TMPDIR")


def test_numbers_that_a_full_disk_cuts_short_are_told_once():
    """Python 3.13 prints what fails as a file goes."""
    code = (
        "import resource; from raydistill.data.texts import Numbers;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); numbers = Numbers()\n"
        "for i in range(20_000): numbers.append(i)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("File too large") == 1


def test_a_copy_for_other_processes_is_a_few_buffers():
    prompts = PromptSet([f"prompt {i}" for i in range(10_000)])
    buffers = []
    rest = pickle.dumps(prompts, protocol=5, buffer_callback=buffers.append)
    assert len(rest) < 2000
    read_only = [bytes(buffer) for buffer in buffers]  # as in Ray's object store
    there = pickle.loads(rest, buffers=read_only)
    assert there.prompts == prompts.prompts
    assert there.at(3, [5, 10_000])[1] == prompts.at(3, [5, 10_000])[1]


def test_texts_are_a_sequence():
    texts = ["", "a", "naïve", "\ud800 of a command line", "", "z" * 70_000]
    stored = Texts(iter(texts))
    assert stored == texts
    assert stored != texts[:-1]
    assert stored != [*texts[:-1], "y"]
    assert [stored[i] for i in range(-6, 6)] == texts * 2
    assert stored[1:-1:2] == texts[1:-1:2]
    assert "naïve" in stored
    with pytest.raises(IndexError):
        stored[6]
    assert list(Texts([])) == []


@pytest.mark.parametrize("count", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_what_lies_on_disk_is_what_memory_would_hold(count):
    values = np.random.default_rng(count).integers(-count // 2, count // 2 + 1, count)
    numbers = Numbers()
    for value in values.tolist():
        numbers.append(value)
    assert repeated(numbers) == count - len(set(values.tolist()))
    equal = Numbers()
    equal.extend(np.zeros(count, np.int64))
    assert repeated(equal) == count - 1  # also across the seams of what is in memory at a time
    texts = [str(value) for value in values.tolist()]
    assert list(Texts(texts)) == texts
    order = permutation(count, np.random.default_rng(3))
    assert (order == np.random.default_rng(3).permutation(count)).all()
