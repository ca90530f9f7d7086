"""A stream of pictures on Ray makes the bytes that one process makes, whatever is read first and wherever it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_sets import png, write_tar, write_tars

from raydistill.config.stages import SynthesisConfig
from raydistill.data.pictures import Filters, open_pictures
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.data.synthesis_stream import synthesise_on_ray
from raydistill.errors import StageFailed
from raydistill.spaces import load_space

pytestmark = [pytest.mark.timeout(600), pytest.mark.full]


class Stopped(Exception):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_set_of_tars_stopped_in_its_middle_is_completed_to_the_same_bytes(
    ray_cluster, flux_folder, sd_folder, tmp_path
):
    write_tars(tmp_path / "tars", (23, 24, 3, 40, 25))
    members = [
        ("a.png", png(900)),
        ("b.png", b"none"),
        ("c.png", png(901, 20, 20)),
        ("d.png", png(902)),
        ("d.txt", "held out"),
    ]
    write_tar(tmp_path / "tars" / "00005.tar", members)

    def recipe(**changes) -> Recipe:
        made = {
            "source": open_pictures(str(tmp_path / "tars/*.tar")),
            "count": None,
            "batch_size": 4,
            "shard_size": 20,
            "seed": 3,
        }
        filters = Filters(min_pixels=30, captions={"held out"})
        return Recipe(
            teacher=load_space(flux_folder), student=load_space(sd_folder), filters=filters, **(made | changes)
        )

    assert synthesise(recipe(), tmp_path / "here", max_failed_rows=1) == 117

    def stop(writer, written) -> None:
        if writer.done >= 45:
            raise Stopped

    with pytest.raises(Stopped):
        synthesise_on_ray(recipe(), tmp_path / "ray", SynthesisConfig(), watch=stop)
    begun = contents(tmp_path / "ray")
    assert 0 < sum(name.endswith(".parquet") for name in begun) < 6
    rows = synthesise_on_ray(recipe(count=70), tmp_path / "ray", SynthesisConfig(encoders=2))
    assert 0 < rows <= 50
    synthesise_on_ray(recipe(), tmp_path / "ray", SynthesisConfig())
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    lost = recipe()
    (tmp_path / "tars" / "00003.tar").unlink()
    with pytest.raises(StageFailed, match=r"a stage failed: OSError: .*00003\.tar, row 1: .*No such file"):
        synthesise_on_ray(lost, tmp_path / "lost", SynthesisConfig())
