"""Nothing that was written elsewhere can run code here. What ruff's S rules do not see is looked for in the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("raydistill/**/*.py"), *ROOT.glob("jobs/*.py")])


def unsafe(source: str) -> list[int]:
    """Lines that read pickles, or run a model's own code."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        pickled = name == "torch.load" and keywords.get("weights_only") != "True"
        if pickled or {"trust_remote_code", "allow_pickle"} & keywords.keys():
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=flag)",
        "load(f, trust_remote_code=True)",
        "np.load(f, allow_pickle=1)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert unsafe(f"x = 1\n{source}") == [2]


def test_no_source_reads_a_pickle_or_runs_a_models_own_code():
    assert len(SOURCES) > 80
    assert {str(file): lines for file in SOURCES if (lines := unsafe(file.read_text()))} == {}
