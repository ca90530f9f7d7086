"""What a picture costs: every part is measured on the real path, and the table says what the Bridge adds."""

from __future__ import annotations

import argparse

import pytest

from raydistill.benchmark import latency

pytestmark = pytest.mark.full


def test_every_part_of_a_picture_is_timed(tmp_path):
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    pair = "shapes:bridge/sd15-flux=shapes:flux"
    result = latency.run(parser.parse_args(["--pairs", pair, "--device", "cpu", "--repeats", "2"]))
    alone, bridged = result["rows"]
    assert alone["seconds"].keys() == {"student", "decode", "total"}
    assert bridged["seconds"].keys() == {"student", "bridge", "decode", "total"}
    assert (alone["side"], bridged["side"]) == (8, 16)  # the latents that are decoded
    assert min(row["peak_bytes"] for row in result["rows"]) > 1e8
    lines = latency.table(result).splitlines()
    added = 1e3 * (bridged["seconds"]["total"] - alone["seconds"]["total"])
    assert lines[3].startswith("| + shapes:bridge/sd15-flux, VAE of shapes:flux |")
    assert f"| {added:+.3g} ms |" in lines[3]
