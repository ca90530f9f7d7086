"""Prompt files as people bring them: quotation marks, encodings, line ends, control characters, folders, JSON lists."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydistill.data.prompts import read_prompts
from raydistill.data.text_files import encoding_of
from raydistill.data.texts import holds_bytes, holds_text, undecoded
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


STRAYS = [('"an unfinished quotation', 'a pipe of 6"'), ('"', '"'), ('"open', '"')]


@pytest.mark.parametrize("layout", ["{},Basic", "7,{}", "7,{},Basic", "{}"])
@pytest.mark.parametrize(("opening", "closing"), STRAYS)
def test_an_opening_and_a_closing_mark_of_different_csv_rows_hide_none_between(tmp_path, layout, opening, closing):
    """Whichever column it is, the first of them costs its own row; a lone mark is one that opens again."""
    rows = [f"cup number {i}" for i in range(1000)]
    rows[300], rows[900] = opening, closing
    header = layout.replace("7", "id").replace("Basic", "note").format("prompt")
    text = "".join(f"{line}\n" for line in [header, *map(layout.format, rows)])
    prompts = read_prompts(write(tmp_path, "p.csv", text), max_characters=50_000)
    bad = [302, 902] if closing == '"' else [302]
    assert prompts.report.first_bad == {"malformed": bad}
    assert prompts.prompts == [row for number, row in enumerate(rows, start=2) if number not in bad]
    assert (prompts.report.rows, prompts.report.hidden) == (1000, 0)


def test_stray_marks_a_few_csv_rows_apart_hide_none_though_one_is_ragged(tmp_path):
    rows = ['"open,x', "a cup,x", "a, b,x", "a jar,x", "a pot,x", "a pan,x", '6",x']
    prompts = read_prompts(write(tmp_path, "p.csv", "prompt,note\n" + "\n".join(rows)))
    assert prompts.prompts == ["a cup", "a", "a jar", "a pot", "a pan", '6"']
    few = read_prompts(write(tmp_path, "q.csv", "prompt,note\n" + "\n".join([rows[0], rows[1], rows[-1]])))
    assert few.prompts == ["a cup", '6"']


@pytest.mark.parametrize(
    "text",
    ["two\nlines", "a cup, red\na jar, blue\na pan", "a\nb,c\nd", '{\n"scene": "a",\n"style": "b"\n}', "one\n\n\nfour"],
)
@pytest.mark.parametrize("columns", [["prompt"], ["prompt", "note"], ["id", "prompt", "note"]])
def test_quoted_text_of_several_lines_is_one_csv_record(tmp_path, columns, text):
    with (tmp_path / "p.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        cells = [[text if column == "prompt" else "x" for column in columns]] * 3
        writer.writerows([columns, *cells])
    prompts = read_prompts(tmp_path / "p.csv")
    assert prompts.prompts == [text] * 3
    assert not prompts.report.bad


def test_a_header_in_quotes_tells_that_quoted_lines_are_text(tmp_path):
    text = "\n".join(["a,b"] * 30)
    file = write(tmp_path, "p.csv", f'"prompt","note"\n"{text}","x"\n')
    assert read_prompts(file).prompts == [text]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_lines_that_a_bad_record_covers_are_counted(tmp_path, suffix):
    separator = {"csv": ",", "tsv": "\t"}[suffix]
    head = f'"prompt"{separator}"note"\n'
    long = "\n".join(["a long text, over many lines"] * 9)
    file = write(tmp_path, f"p.{suffix}", head + f'"{long}"{separator}"x"\n"a cup"{separator}"x"\n')
    report = read_prompts(file, max_characters=100).report
    assert (report.rows, report.good, report.hidden) == (2, 1, 8)
    assert str(report).endswith("1 longer than 100 characters (row 2); in their quotation marks lie 8 more lines")
    assert read_prompts(file).report.hidden == 0


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
    for few in (b"a\0", b"a\0b", b"\0a", b"\0a\0", b"a\0b\0", b"a\0b\0c", b"a\0b\0c\0d", b"a\0\n"):
        assert encoding_of(few) == "utf-8", few


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_short_and_cut_utf_16_without_a_mark_is_recognised(tmp_path, encoding):
    assert read_prompts(write(tmp_path, "p.txt", "cup".encode(encoding))).prompts == ["cup"]
    content = "\n".join([*CUPS, *CUPS]).encode(encoding)
    assert read_prompts(write(tmp_path, "q.txt", content + content[:1])).prompts[:5] == [*CUPS, *CUPS][:5]


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


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_bare_texts_of_a_list_or_folder_are_prompts_whatever_the_column_is_called(tmp_path, column):
    write(tmp_path, "texts/1.txt", "a red cup")
    write(tmp_path, "mixed/1.txt", "a red cup")
    write(tmp_path, "mixed/2.json", json.dumps(["a jar", {column: "a pot", "category": "x"}, 3]))
    assert read_prompts(tmp_path / "texts", column).prompts == ["a red cup"]
    assert read_prompts(write(tmp_path, "p.json", json.dumps(CUPS)), column).prompts == CUPS
    mixed = read_prompts(tmp_path / "mixed", column)
    assert mixed.prompts == ["a red cup", "a jar", "a pot"]
    assert mixed.report.bad == {"not a string": 1}
    with pytest.raises(InputError, match=f"no column {column!r}.*'text'"):
        read_prompts(write(tmp_path, "q.json", '[{"text": "x"}, 3]'), column)
    assert list(open_prompts(str(tmp_path / "mixed"), tmp_path, column).categories.values()) == ["2", "x", "2"]


def test_a_bare_text_is_no_category(tmp_path):
    file = write(tmp_path, "p.json", json.dumps(CUPS))
    assert open_prompts(str(file), tmp_path).categories == {}
    with pytest.raises(InputError, match="bare texts have no columns .--category-column kind"):
        open_prompts(str(file), tmp_path, category_column="kind")


class Captions(pa.ExtensionType):
    """A type over another one, as programs define them."""

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, f"raydistill.test.{storage}")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Captions:
        return cls(storage)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_extension_types_over_text_are_read_as_text(tmp_path, kind):
    known = Captions(kind)
    storage = pa.array([*CUPS, None], kind if not pa.types.is_dictionary(kind) else pa.string())
    storage = storage.dictionary_encode() if pa.types.is_dictionary(kind) else storage
    column = pa.ExtensionArray.from_storage(known, storage)
    assert (holds_text(known), undecoded(column)) == (True, [*(cup.encode() for cup in CUPS), None])
    assert undecoded(pa.chunked_array([column, column])) == 2 * undecoded(column)
    assert not holds_text(Captions(pa.int32()))
    assert not holds_text(pa.list_(pa.string()))
    assert not holds_bytes(Captions(pa.string()))
    if pa.types.is_dictionary(kind):  # Arrow itself aborts on these in a file
        return
    pa.register_extension_type(known)
    try:
        pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
        assert pq.read_schema(tmp_path / "p.parquet").field("prompt").type == known
        prompts = read_prompts(tmp_path / "p.parquet")
    finally:
        pa.unregister_extension_type(known.extension_name)
    assert (prompts.prompts, prompts.report.bad) == (CUPS, {"null": 1})


def test_json_columns_of_arrow_are_texts(tmp_path):
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["3 cups", "a cup"]))
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet").prompts == ["3 cups", "a cup"]


def test_the_first_of_several_columns_that_is_there_counts(tmp_path):
    columns = ("prompt", "Prompt")
    assert read_prompts(write(tmp_path, "p.tsv", "Prompt\tprompt\nno\tyes\n"), columns).prompts == ["yes"]
    assert read_prompts(
        write(tmp_path, "p.jsonl", '{"Prompt": "one"}\n{"Prompt": "x", "prompt": "two"}'), columns
    ).prompts == [
        "one",
        "two",
    ]
