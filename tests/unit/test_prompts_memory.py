"""Prompt files take little memory, however they look."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import pytest
from lanes import full_but

from raydistill.data.prompts import read_prompts
from raydistill.errors import InputError


def test_a_file_that_the_system_refuses_is_refused(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        read_prompts(tmp_path / ("x" * 300 + ".txt"))


# -- memory ------------------------------------------------------------------------------------------------


def peak_of_reading(file: Path, **rules) -> int:
    """Most bytes that Python held during the reading."""
    tracemalloc.start()
    try:
        read_prompts(file, **rules)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_proportional_to_the_text(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("".join(f"a photograph of the cat with the number {i:06d}, in the rain\n" for i in range(200_000)))
    assert peak_of_reading(file) < 5 * file.stat().st_size  # one str is 49 bytes beside its text


BAD_LINES = {
    "txt": itertools.cycle(["", "long " * 20, " \t"]),
    "csv": itertools.cycle(["1", "", f'2,"{"long " * 20}"', '3,"a" b', "4,"]),
    "jsonl": (
        line
        for i in itertools.count()
        for line in (f'{{"key {i}": "{i}"}}', "{", "", '{"prompt": null}', f'{{"prompt": "{"long " * 20}"}}')
    ),
}


@pytest.mark.parametrize("suffix", full_but(BAD_LINES, "jsonl"))
def test_bad_rows_are_not_kept_in_memory(suffix, tmp_path):
    file, first = (
        tmp_path / f"bad.{suffix}",
        {"txt": "a cat", "csv": "id,prompt\n0,a cat", "jsonl": '{"prompt": "a cat"}'},
    )
    file.write_text("\n".join([first[suffix], *itertools.islice(BAD_LINES[suffix], 60_000)]) + "\n")
    assert peak_of_reading(file, max_characters=50) < 250_000 < file.stat().st_size / 4


def test_keys_of_json_lines_without_the_column_are_not_collected(tmp_path):
    file = tmp_path / "keys.jsonl"
    file.write_text("".join(f'{{"the key of line {i}": "a cat in the rain with a hat"}}\n' for i in range(40_000)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="no column 'prompt'.*'the key of line 0'.*, …$") as error:
            read_prompts(file)
        assert tracemalloc.get_traced_memory()[1] < 500_000 < file.stat().st_size / 4
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 1000
