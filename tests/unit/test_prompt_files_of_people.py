"""Prompt files as people bring them: quotation marks, encodings, line ends, control characters, folders, JSON lists."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydistill.data.prompts import read_prompts
from raydistill.data.text_files import encoding_of
from raydistill.errors import InputError
from raydistill.evaluation.promptsets import open_prompts

CUPS = ["a red cup", "a blue cup", "a green cup"]


def write(folder, name: str, content: bytes | str):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# -- quotation marks ------------------------------------------------------------------------------------


def table(folder, suffix: str, rows: list[str]):
    separator = {"csv": ",", "tsv": "\t"}[suffix]
    return write(folder, f"p.{suffix}", "".join(f"{row}{separator}Basic\n" for row in ["prompt", *rows]))


@pytest.mark.parametrize("places", [[4], [0], [59], [3, 41], [3, 4], [0, 20, 40]])
@pytest.mark.parametrize("text", ['"an unfinished quotation', '"Stop" it says', '"', 'a cup of 6"', '6" and 7"'])
def test_a_quotation_mark_in_tsv_is_text(tmp_path, places, text):
    rows = [text if i in places else f"cup number {i}" for i in range(60)]
    prompts = read_prompts(table(tmp_path, "tsv", rows))
    assert prompts.prompts == rows
    assert prompts.ids.tolist() == list(range(2, 62))
    assert str(prompts.report).startswith(f"{tmp_path}/p.tsv: 60 prompts of 60 rows")


def test_an_opening_and_a_closing_mark_of_different_tsv_rows_hide_none_between(tmp_path):
    rows = ['"an unfinished quotation', "a cup", "another", 'a pipe of 6"', "the last"]
    assert read_prompts(table(tmp_path, "tsv", rows)).prompts == rows
    ragged = write(tmp_path, "ragged.tsv", 'prompt\tnote\n"an unfinished\na cup\tx\n6"\tx\n')
    assert read_prompts(ragged).prompts == ['"an unfinished', "a cup", '6"']
    one_column = write(tmp_path, "one.tsv", "prompt\n" + "\n".join(rows))
    assert read_prompts(one_column).prompts == rows


def test_quoted_fields_that_programs_write_to_tsv_lose_their_quotes(tmp_path):
    content = 'prompt\tnote\n"a ""big"" cup"\tx\n"two\nlines"\tx\n"with\ttab"\tx\n"a ""small"" cup"\t"open\nlast\tx\n'
    prompts = read_prompts(write(tmp_path, "p.tsv", content))
    assert prompts.prompts == ['a "big" cup', "two\nlines", "with\ttab", 'a "small" cup', "last"]
    assert prompts.ids.tolist() == [2, 3, 5, 6, 7]
    quoted = write(tmp_path, "q.tsv", '"prompt"\n"two\nlines"\n"a ""big"" cup"\n')  # as is everything in this file
    assert read_prompts(quoted).prompts == ["two\nlines", 'a "big" cup']


@pytest.mark.parametrize("places", [[4], [59], [3, 41], [3, 4]])
def test_an_unclosed_quote_in_csv_costs_its_own_row_alone(tmp_path, places):
    rows = ['"an unfinished quotation' if i in places else f"cup number {i}" for i in range(60)]
    prompts = read_prompts(table(tmp_path, "csv", rows))
    assert prompts.prompts == [row for row in rows if '"' not in row]
    assert (prompts.report.rows, prompts.report.bad) == (60, {"malformed": len(places)})
    assert prompts.report.first_bad == {"malformed": [place + 2 for place in places]}


def test_a_quote_that_is_never_closed_in_a_large_csv_costs_one_row(tmp_path):
    rows = [f"cup number {i}" for i in range(100_000)]
    prompts = read_prompts(table(tmp_path, "csv", ['"open', *rows]))
    assert len(prompts) == len(rows)
    assert prompts.report.first_bad == {"malformed": [2]}


# -- encodings, line ends, control characters -------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_encoding_and_line_end_reads_the_same(tmp_path, encoding, end):
    text = end.join(CUPS) + end
    assert read_prompts(write(tmp_path, "p.txt", text.encode(encoding))).prompts == CUPS
    lines = end.join(json.dumps({"prompt": cup}) for cup in CUPS)
    prompts = read_prompts(write(tmp_path, "p.jsonl", lines.encode(encoding)))
    assert (prompts.prompts, prompts.ids.tolist()) == (CUPS, [1, 2, 3])
    assert read_prompts(write(tmp_path, "p.csv", f"prompt{end}{text}".encode(encoding))).prompts == CUPS
    assert read_prompts(write(tmp_path, "p.json", json.dumps(CUPS).encode(encoding))).prompts == CUPS


def test_utf_16_with_a_mark_holds_any_script_and_counts_what_is_broken(tmp_path):
    content = "一只上开\n".encode("utf-16") + b"\x3d\xd8\n\0" + "naïve".encode("utf-16-le") + b"x"
    prompts = read_prompts(write(tmp_path, "p.txt", content))
    assert prompts.prompts == ["一只上开"]
    assert prompts.report.bad == {"not valid UTF-8": 2}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["一只红色的杯子\n上开一只\n", "красная чашка\nчай\n", "كوب أحمر\nكوب\n", "ถ้วยแดง\nถ้วย\n", "빨간 컵\n컵\n",
                                  "źdźbło\nżółw\n"])  # fmt: skip
def test_utf_16_without_a_mark_is_recognised_in_any_script(tmp_path, text, encoding):
    assert read_prompts(write(tmp_path, "p.txt", text.encode(encoding))).prompts == text.split("\n")[:-1]


def test_a_few_zeros_make_no_utf_16():
    assert encoding_of(b"a red\0 cup\na blue cup\n") == "utf-8"
    assert encoding_of(b"a red cup\0\nblue cup\0\na chef\x92s cup\0\n") == "utf-8"  # strings of C
    assert encoding_of(b"") == encoding_of(b"a") == "utf-8"


@pytest.mark.parametrize("character", ["\0", "\x04", "\x08", "\x1b", "\x1c", "\x7f", "\x9b"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_control_characters_are_counted(tmp_path, suffix, character):
    texts = [f"a red{character} cup", "a blue cup", "a\tgreen cup"]
    content = {
        "txt": "\n".join(texts),
        "csv": "prompt\n" + "\n".join(texts),
        "tsv": "prompt\tnote\n" + "\n".join(f'"{text}"\tx' for text in texts),
        "jsonl": "\n".join(json.dumps({"prompt": text}) for text in texts),
        "json": json.dumps(texts),
    }
    file = write(tmp_path, f"p.{suffix}", content.get(suffix, ""))
    if suffix == "parquet":
        pq.write_table(pa.table({"prompt": texts}), file)
    prompts = read_prompts(file)
    assert prompts.prompts == texts[1:]
    assert prompts.report.bad == {"with control characters": 1}


# -- folders and lists ----------------------------------------------------------------------------------


def test_a_folder_is_read_by_the_rules_of_files(tmp_path):
    contents = {"1.txt": b"\xef\xbb\xbfa red cup\n", "2.txt": b"a chef\x92s table", "3.txt": b"a\0 cup", "4.txt": b" ",
                "5.TXT": "a blue cup\r\nof tea".encode("utf-16"), "6.txt": b"x" * 2001, "._1.txt": b"\0\5\x16\7", ".DS_Store": b"\0",
                "readme.md": b"# cups"}  # fmt: skip
    for name, content in contents.items():
        write(tmp_path, f"set/{name}", content)
    prompts = read_prompts(tmp_path / "set")
    assert prompts.prompts == ["a red cup", "a blue cup\r\nof tea"]
    assert prompts.ids.tolist() == [1, 5]
    assert str(prompts.report) == (
        f"{tmp_path}/set: 2 prompts of 6 rows; bad rows: 1 not valid UTF-8 (2.txt), 1 with control characters (3.txt), "
        "1 blank (4.txt), 1 longer than 2000 characters (6.txt)"
    )
    with pytest.raises(InputError, match=r"set, 2\.txt: not valid UTF-8$"):
        read_prompts(tmp_path / "set", on_bad_row="fail")
    assert open_prompts(str(tmp_path / "set"), tmp_path).prompts.prompts == prompts.prompts


def test_lists_are_read_by_the_rules_of_files(tmp_path):
    entries = ["a red cup", {"prompt": "a blue cup"}, 3, None, {"text": "x"}, "", ["a"], "a red cup"]
    file = write(tmp_path, "list.json", b"\xef\xbb\xbf" + json.dumps(entries).encode())
    prompts = read_prompts(file)
    assert prompts.prompts == ["a red cup", "a blue cup", "a red cup"]
    assert prompts.ids.tolist() == [1, 2, 8]
    assert "3 prompts of 8 rows, 1 repeated; bad rows: 2 not a string (entry 3, entry 7), 1 null (entry 4)" in str(
        prompts.report
    )
    write(tmp_path, "set/a.json", '["caf\xe9", "a cup"]'.encode("cp1252"))
    write(tmp_path, "set/b.json", '[{"prompt": "a jar", "category": 7}, {"prompt": "a pot"}]')
    found = open_prompts(str(tmp_path / "set"), tmp_path)
    assert found.prompts.prompts == ["a cup", "a jar", "a pot"]
    assert "1 not valid UTF-8 (a.json, entry 1)" in str(found.prompts.report)
    assert [found.categories[i] for i in found.prompts.ids] == ["a", "7", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", b"{}", "must be a JSON list"),
        ("p.json", b"[]", "must be a JSON list"),
        ("p.json", b'["a cup"', "not JSON"),
        ("p.json", b"[" * 100_000, "not JSON"),
        ("p.json", b'[{"text": "x"}]', "no column 'prompt'.*'text'"),
        ("set/bad.json", b"a cup", r"bad\.json: not JSON"),
        ("set/._1.txt", b"a cup", "a folder without .json or .txt files"),
        ("set/1.txt", b"\xff", r"no usable prompt in 1 rows: 1 not valid UTF-8 \(1\.txt\)"),
    ],
)
def test_an_unusable_list_or_folder_is_refused_in_one_line(tmp_path, name, content, said):
    write(tmp_path, name, content)
    with pytest.raises(InputError, match=said) as error:
        read_prompts(tmp_path / name.partition("/")[0])
    assert len(str(error.value).splitlines()) == 1


def test_the_first_of_several_columns_that_is_there_counts(tmp_path):
    columns = ("prompt", "Prompt")
    assert read_prompts(write(tmp_path, "p.tsv", "Prompt\tprompt\nno\tyes\n"), columns).prompts == ["yes"]
    assert read_prompts(
        write(tmp_path, "p.jsonl", '{"Prompt": "one"}\n{"Prompt": "x", "prompt": "two"}'), columns
    ).prompts == [
        "one",
        "two",
    ]
