"""Any prompt file, in any format, with any bad rows: what is kept, counted, numbered and refused.

Files are written here byte by byte, with the row numbers and the kinds of bad rows that the reader must find.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from raydistill.data.prompts import PromptSet, read_prompts
from raydistill.data.text_files import HEAD, encoding_of
from raydistill.errors import InputError

LONGEST = 30  # characters
BOM = b"\xef\xbb\xbf"
SUFFIXES = ("txt", "csv", "tsv", "jsonl", "parquet")
DELIMITERS = {"csv": ",", "tsv": "\t"}

properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples: each overwrites the file of the one before."""
    return tmp_path_factory.mktemp("prompts")


# -- rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What stands in a row's prompt, as bytes; why it is bad, or None."""

    content: bytes | None
    bad: str | None = None


def row(text: str) -> Row:
    """A row of valid text; whether it is good follows from the rules in words."""
    kept = text.strip()
    bad = "blank" if not kept else f"longer than {LONGEST} characters" if len(kept) > LONGEST else None
    if any(unicodedata.category(c) == "Cc" and c not in "\t\n\v\f\r\x85" for c in kept):
        bad = bad or "with control characters"
    return Row(text.encode(), bad)


scalars = st.characters(exclude_categories=["Cs"])  # of every script; lone surrogates have no UTF-8
spaces = st.text(" \t\r\n\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u3000", max_size=3)
texts = st.one_of(
    st.builds(lambda before, text, after: before + text + after, spaces, st.text(scalars, max_size=12), spaces),
    st.sampled_from(["a cat", " a cat ", "naïve", "\ufeffcat", "", '"', '""', 'a "cat", big', "\u202eאבג", "กาแฟ", "👩‍👩‍👧", "e\u0301"]),
    st.text(scalars, min_size=LONGEST - 1, max_size=LONGEST + 2),
)  # fmt: skip
undecodable = st.one_of(
    st.sampled_from([b"\xff", b"a\xc3", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\x80 cat", b"na\xefve"]),
    st.characters(categories=["Cs"]).map(lambda lone: f"a{lone}".encode("utf-8", "surrogatepass")),
).map(lambda content: Row(content, "not valid UTF-8"))
lines = texts.map(lambda text: text.replace("\n", " ").replace("\r", " ")).map(row)


@dataclass(frozen=True)
class Expected:
    """A row as the reader must see it."""

    number: int
    prompt: str | None
    bad: str | None

    @staticmethod
    def of(number: int, found: Row) -> Expected:
        return Expected(number, None if found.bad else found.content.decode().strip(), found.bad)


def check(file: Path, expected: list[Expected]) -> None:
    """Everything that `read_prompts` promises about a file whose rows are known."""
    assume(file.suffix == ".parquet" or encoding_of(file.read_bytes()[:HEAD]).startswith("utf-8"))
    kept = [e for e in expected if not e.bad]
    bad = [e for e in expected if e.bad]
    if not kept:
        for on_bad_row in ("skip", "fail"):
            with pytest.raises(InputError, match=re.escape(str(file))):
                read_prompts(file, on_bad_row=on_bad_row, max_characters=LONGEST)
        return
    prompts = read_prompts(file, max_characters=LONGEST)
    assert prompts.prompts == [e.prompt for e in kept]
    assert prompts.ids.tolist() == [e.number for e in kept]
    assert len(set(prompts.ids.tolist())) == len(kept)
    report = prompts.report
    assert (report.rows, report.good) == (len(expected), len(kept))
    assert report.bad == Counter(e.bad for e in bad)
    assert report.good + sum(report.bad.values()) == report.rows
    for kind, numbers in report.first_bad.items():
        assert numbers == [e.number for e in bad if e.bad == kind][:5]
    assert report.duplicates == len(kept) - len({e.prompt for e in kept})
    assert f"{len(kept)} prompts of {len(expected)} rows" in str(report)
    if bad:
        message = re.escape(f"{file}, row {bad[0].number}: {bad[0].bad}")
        with pytest.raises(InputError, match=f"^{message}$"):
            read_prompts(file, on_bad_row="fail", max_characters=LONGEST)
    else:
        same = read_prompts(file, on_bad_row="fail", max_characters=LONGEST)
        assert (same.prompts, same.ids.tolist()) == (prompts.prompts, prompts.ids.tolist())


# -- txt -------------------------------------------------------------------------------------------------


@properties
@given(
    rows=st.lists(st.one_of(lines, undecodable), min_size=1, max_size=12),
    ends=st.sampled_from([[b"\n"], [b"\r\n"], [b"\n", b"\r\n"], [b"\r"], [b"\r\r\n"]]),
    bom=st.booleans(),
    end=st.booleans(),
)
@example(rows=[row("a cat"), row("")], ends=[b"\n"], bom=True, end=True)  # fmt: skip
def test_text_files(folder, rows, ends, bom, end):
    content = [r.content + e for r, e in zip(rows, itertools.cycle(ends), strict=False)]
    if not end and rows[-1].content:
        content[-1] = rows[-1].content
    bom = bom or rows[0].content.startswith(BOM)  # which would be taken for the file's
    file = folder / "p.txt"
    file.write_bytes(BOM * bom + b"".join(content))
    check(file, [Expected.of(i, r) for i, r in enumerate(rows, start=1)])


# -- csv, tsv ----------------------------------------------------------------------------------------------


def cell(content: bytes, delimiter: str, quoted: bool) -> bytes:
    """A field, in quotes when it must be."""
    if quoted or re.search(rb'["\r\n]|' + delimiter.encode(), content):
        return b'"' + content.replace(b'"', b'""') + b'"'
    return content


def no_rows(text: str, suffix: str) -> str:
    """Of quoted text that spans lines, none may look like a whole row."""
    if suffix == "tsv":
        return re.sub("[\t\r\n]", " ", text) if "\t" in text else text
    return (
        re.sub("[\r\n]", " ", text) if re.search(",(?! )", text) else text
    )  # commas of prose have a blank behind them


malformed = st.sampled_from([b'"a" cat', b'"a"b"', b'a,"b"c']).map(lambda content: Row(content, "malformed"))
without = st.sampled_from([b"1", b'"1"', b"cat"]).map(lambda content: Row(content, "without 'prompt'"))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@properties
@given(
    rows=st.lists(st.one_of(texts.map(row), undecodable, malformed, without), min_size=1, max_size=12),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=13),
    quoted=st.lists(st.booleans(), min_size=12),
    bom=st.booleans(),
    last=st.booleans(),
    unclosed=st.booleans(),
)
def test_tables(folder, suffix, rows, ends, quoted, bom, last, unclosed):
    """A prompt is the second of three cells; its row's number is that of the row's first line."""
    d = DELIMITERS[suffix]
    records, expected = [b"id" + d.encode() + b"prompt" + d.encode() + b"note" + ends[0]], []
    for r, end, quote in zip(rows, ends[1:], quoted, strict=False):
        number = 1 + len(re.findall(rb"\r\n|\r|\n", b"".join(records)))
        if r.content is not None and r.bad not in ("malformed", "without 'prompt'", "not valid UTF-8"):
            r = row(no_rows(r.content.decode(), suffix))
        if suffix == "tsv" and r.bad == "malformed":  # there is no such thing: quotation marks are text
            prompt = b'"b"c' if b"," in r.content else None
            expected.append(Expected(number, prompt and prompt.decode(), None if prompt else "without 'prompt'"))
        else:
            expected.append(Expected.of(number, r))
        if r.bad == "malformed":
            record = r.content.replace(b",", d.encode())
        elif r.bad == "without 'prompt'":
            record = r.content
        else:
            record = b"7" + d.encode() + cell(r.content, d, quote) + d.encode() + b"note"
        records.append(record + end)
    if unclosed:  # costs its own row at most
        number = 1 + len(re.findall(rb"\r\n|\r|\n", b"".join(records)))
        expected.append(
            Expected(number, '"never closed', None) if suffix == "tsv" else Expected(number, None, "malformed")
        )
        expected.append(Expected(number + 1, "not lost", None))
        records.append(b'8,"never closed\n9,not lost\n'.replace(b",", d.encode()))
    elif not last:
        records[-1] = records[-1].rstrip(b"\r\n") or records[-1]
    file = folder / f"p.{suffix}"
    file.write_bytes(BOM * bom + b"".join(records))
    check(file, expected)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@properties
@given(
    prompts=st.lists(texts, min_size=1, max_size=12),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_what_the_csv_module_writes_comes_back(folder, suffix, prompts, quoting, encoding):
    file = folder / f"w.{suffix}"
    prompts = [no_rows(prompt, suffix) for prompt in prompts]
    with file.open("w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, delimiter=DELIMITERS[suffix], quoting=quoting)
        writer.writerows([("prompt", "id"), *((p, i) for i, p in enumerate(prompts))])
    kept = [p.strip() for p in prompts if row(p).bad is None]
    if not kept:
        with pytest.raises(InputError, match="no usable prompt"):
            read_prompts(file, max_characters=LONGEST)
        return
    read = read_prompts(file, max_characters=LONGEST)
    assert read.prompts == kept
    assert read.report.rows == len(prompts)


def test_a_malformed_header_is_refused(folder):
    file = folder / "h.csv"
    for header in (b'"prompt"s\n', b'"prompt', b'"' + b"x" * (2 << 20) + b'"\n'):
        file.write_bytes(header + b"a cat\n")
        with pytest.raises(InputError, match="h.csv: the header line is malformed"):
            read_prompts(file)


# -- jsonl -------------------------------------------------------------------------------------------------


def json_row(text: str, ascii_only: bool) -> Row:
    """An object with this prompt; the content is its line."""
    line = json.dumps({"note": 1, "prompt": text}, ensure_ascii=ascii_only).encode("utf-8")
    return Row(line, row(text).bad)


bad_json = st.sampled_from([
    Row(b"", "blank"), Row(b" \t", "blank"), Row(b'{"prompt": null}', "null"), Row(b'{"prompt": 7}', "not a string"),
    Row(b'{"prompt": NaN}', "not a string"), Row(b'{"prompt": ["a cat"]}', "not a string"),
    Row(b'{"prompt": {}}', "not a string"), Row(b'{"prompt": true}', "not a string"),
    Row(b'{"prompt": "a cat"', "not JSON"), Row(b"a cat", "not JSON"), Row(b'{"prompt": "a\tcat"}', "not JSON"),
    Row(b'{"prompt": "a \\u12"}', "not JSON"), Row(b"[" * 100_000, "not JSON"), Row(b"1" * 5000, "not JSON"),
    Row(b'["a cat"]', "not a JSON object"), Row(b'"a cat"', "not a JSON object"), Row(b"3", "not a JSON object"),
    Row(b"null", "not a JSON object"), Row(b"{}", "without 'prompt'"), Row(b'{"Prompt": "x"}', "without 'prompt'"),
    Row(b'{"text": "\\ud800"}', "without 'prompt'"), Row(b'{"prompt": "\xff"}', "not valid UTF-8"),
    Row(b'{"prompt": "\\ud800"}', "not valid UTF-8"), Row(b'{"prompt": "\xed\xa0\x80"}', "not valid UTF-8"),
    Row(b'{"\xff": 1, "prompt": "a cat"}', "not valid UTF-8"),
])  # fmt: skip


@properties
@given(
    rows=st.lists(st.one_of(st.builds(json_row, texts, st.booleans()), bad_json), min_size=1, max_size=12),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=12),
    bom=st.booleans(),
)
def test_json_lines(folder, rows, ends, bom):
    file = folder / "p.jsonl"
    file.write_bytes(BOM * bom + b"".join(r.content + e for r, e in zip(rows, ends, strict=False)))
    check(
        file,
        [
            Expected(i, None if r.bad else json.loads(r.content)["prompt"].strip(), r.bad)
            for i, r in enumerate(rows, start=1)
        ],
    )


units = st.one_of(st.integers(0, 0xFFFF), st.integers(0xD800, 0xDFFF), st.sampled_from([0x20, 0x61, 0xFEFF, 0]))


@properties
@given(codes=st.lists(units, min_size=1, max_size=8))
@example(codes=[0xD83D, 0xDE80])  # a pair
@example(codes=[0xDE80, 0xD83D])  # the same, reversed
@example(codes=[0xD83D, 0xD83D, 0xDE80])
def test_escaped_code_units_are_a_prompt_exactly_if_they_are_valid_utf_16(folder, codes):
    line = '{"prompt": "' + "".join(f"\\u{code:04x}" for code in codes) + '"}'
    file = folder / "u.jsonl"
    file.write_text(f'{line}\n{{"prompt": "a cat"}}\n', encoding="ascii")
    try:
        text = np.array(codes, dtype="<u2").tobytes().decode("utf-16-le")
    except UnicodeDecodeError:
        first = Expected(1, None, "not valid UTF-8")
    else:
        first = Expected(1, text.strip(), row(text).bad)
    check(file, [first, Expected(2, "a cat", None)])


# -- parquet -----------------------------------------------------------------------------------------------


def column_of(contents: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """A column of these bytes, which need not be UTF-8."""
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return pa.array(contents, raw[kind]).view(kind) if kind in raw else pa.array(contents, kind)


@properties
@given(
    rows=st.lists(st.one_of(texts.map(row), undecodable, st.just(Row(None, "null"))), min_size=1, max_size=12),
    kind=st.sampled_from(
        [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
    ),
    dictionary=st.booleans(),
    group=st.integers(1, 12),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
)
def test_parquet_files(folder, rows, kind, dictionary, group, compression):
    column = column_of([r.content for r in rows], kind)
    if dictionary and kind not in (pa.string_view(), pa.binary_view()):  # of which parquet files have no dictionaries
        column = column.dictionary_encode()
    file = folder / "p.parquet"
    table = pa.table({"number": range(len(rows)), "prompt": column, "prompt.note": ["x"] * len(rows)})
    pq.write_table(table, file, row_group_size=group, compression=compression)
    check(file, [Expected.of(i, r) for i, r in enumerate(rows, start=1)])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["prompt", "prompt"], "2 columns are named 'prompt'"),
        (["Prompt", "text"], "no column 'prompt'.*'Prompt', 'text'"),
        ([f"column{i}" for i in range(30)], "no column 'prompt'.*'column19', …$"),
    ],
)
def test_a_parquet_file_without_exactly_one_prompt_column_is_refused(folder, columns, said):
    file = folder / "c.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a cat"])] * len(columns), names=columns), file)
    with pytest.raises(InputError, match=said):
        read_prompts(file)


# -- every format ------------------------------------------------------------------------------------------


def write(folder: Path, suffix: str, prompts: list[str]) -> Path:
    """The same prompts in any format; none has a line break."""
    file = folder / f"same.{suffix}"
    if suffix == "txt":
        file.write_bytes("".join(f"{p}\n" for p in prompts).encode())
    elif suffix == "jsonl":
        file.write_bytes("".join(json.dumps({"prompt": p}) + "\n" for p in prompts).encode())
    elif suffix == "parquet":
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), file)
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=DELIMITERS[suffix])
        writer.writerows([["prompt"], *([p] for p in prompts)])
        file.write_bytes(text.getvalue().encode())
    return file


one_line = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8).map("a{}z".format)


@properties
@given(
    prompts=st.lists(one_line, min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**6),
)
def test_the_order_of_an_epoch_is_the_same_whatever_the_format(folder, prompts, seed, start):
    positions = np.arange(start, start + 2 * len(prompts) + 1)
    read = {suffix: read_prompts(write(folder, suffix, prompts)) for suffix in SUFFIXES}
    served = {suffix: some.at(seed, positions)[1] for suffix, some in read.items()}
    assert all(found == served["txt"] for found in served.values())
    for suffix, some in read.items():  # an id leads to its prompt, and every one is served once an epoch
        ids, found = some.at(seed, len(prompts) * (start % 7) + np.arange(len(prompts)))
        assert sorted(ids.tolist()) == some.ids.tolist(), suffix
        of_id = dict(zip(some.ids.tolist(), prompts, strict=True))
        assert found == [of_id[i] for i in ids.tolist()]


soup = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from([
            b"prompt", b"id", b'"', b'""', b",", b"\t", b"\n", b"\r", b"\r\n", BOM, b"\xff", b"\xff\xfe", b"\0", b"{", b"}",
            b'{"prompt":', b'"a cat"', b"null", b"\\ud800", b"\xed\xa0\x80", b"[", b" ", b"a cat", b"\xe2\x80\xa8", b"\x1a",
            b"prompt\n", b'{"prompt": "x"}\n',
        ]),
        max_size=14,
    ).map(b"".join),
)  # fmt: skip


def usable_or_refused(file: Path, **rules) -> PromptSet | None:
    try:
        prompts = read_prompts(file, **rules)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert str(file) in refusal
        return None
    report = prompts.report
    assert report.good == len(prompts) == len(prompts.ids)
    assert report.good + sum(report.bad.values()) == report.rows
    assert (np.diff(prompts.ids) > 0).all()
    assert all(p == p.strip() and p and p.encode() for p in prompts.prompts)
    return prompts


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(properties, max_examples=150)
@given(content=soup)
def test_any_bytes_are_read_or_refused(folder, suffix, content):
    file = folder / f"soup.{suffix}"
    file.write_bytes(content)
    skipped = usable_or_refused(file)
    failed = usable_or_refused(file, on_bad_row="fail")
    assert (failed is None) == (skipped is None or bool(skipped.report.bad))


@pytest.mark.full
def test_a_parquet_file_with_any_byte_changed_or_cut_off_anywhere_is_read_or_refused(folder):
    """Among them: names that are no UTF-8, types that there are not, statistics and sizes that lie."""
    buffer, file = io.BytesIO(), folder / "damaged.parquet"
    prompts = [f"a cat {i}" for i in range(8)]
    pq.write_table(pa.table({"id": range(8), "prompt": prompts}), buffer, compression="none")
    whole = buffer.getvalue()
    refused = 0
    for place, mask in itertools.product(range(len(whole)), (0x02, 0x10, 0x80)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        refused += usable_or_refused(file) is None
    assert 0.1 < refused / (3 * len(whole)) < 0.9
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert usable_or_refused(file) is None
