"""Tables of scores fit a terminal of 80 columns with every metric's name in one piece."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raydistill.evaluation.summary import table

OF_JUDGE = ["mean", "size", "color", "shape", "position", "background", "all"]
WHO = ["student before", "student after", "control: VSD off", "control: shared space", "teacher"]


@pytest.mark.parametrize(("more", "leads"), [([], "mean"), (["clipscore", "pickscore", "command:length"], "clipscore")])
def test_names_stay_whole_and_the_chosen_metric_leads(more, leads):
    names = [*OF_JUDGE, *more]
    rows = {who: {name: 10.0 * row + place for place, name in enumerate(names)} for row, who in enumerate(WHO)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(rows, "title", first=leads))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    assert [word for word in words if word in names][0] == leads
    for place, name in enumerate(names):
        assert words.count(name) == 1
        for row in range(len(WHO)):
            assert f"{10.0 * row + place:.3f}" in words
