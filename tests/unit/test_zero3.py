"""ZeRO-3 loading, on two spawned gloo ranks: same numbers, half the parameters, buffers as diffusers has them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

WORLD = 2


@dataclass
class Case:
    folder: str
    dtype: torch.dtype
    inputs: dict[str, torch.Tensor]


def _rank_process(rank: int, port: int, cases: list[Case], folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from raydistill.errors import InputError
    from raydistill.spaces.flux import FluxSpace
    from raydistill.teachers import zero3

    assert "mlflow" not in sys.modules  # a second of every rank's start
    store = torch.distributed.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    zero3.init_process_group(rank, WORLD, store, torch.device("cpu"))
    found = []
    for case in cases:
        engine = zero3.load_partitioned(FluxSpace(case.folder), case.dtype, torch.device("cpu"), rank, WORLD)
        share = zero3.partition_numel(engine) / zero3.full_numel(engine)
        with torch.no_grad():
            output = engine(**case.inputs, return_dict=False)[0]
            try:
                engine(**{name: value[..., :3] for name, value in case.inputs.items()}, return_dict=False)
                failed = False
            except RuntimeError:
                failed = True
            zero3.release(engine)
            again = engine(**case.inputs, return_dict=False)[0]
        after = zero3.partition_numel(engine) / zero3.full_numel(engine)
        buffers = dict(engine.module.named_buffers())
        found.append(
            {"share": share, "after": after, "output": output, "failed": failed, "again": again, "buffers": buffers}
        )
    with pytest.raises(InputError, match="is missing"):
        zero3.load_partitioned(FluxSpace(f"{folder}/torn"), torch.float32, torch.device("cpu"), rank, WORLD)
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _miniatures(folder: Path) -> list[Case]:
    """FLUX in float32 (one file), SD 3 in bfloat16 (several files, a persistent buffer), PixArt (a computed buffer)."""
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

    from raydistill.shapes import miniatures

    torch.manual_seed(0)
    flux = miniatures.flux_transformer()
    common = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2}
    sd3 = SD3Transformer2DModel(
        **common,
        attention_head_dim=16,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )
    pixart = PixArtTransformer2DModel(
        **common, attention_head_dim=16, out_channels=8, cross_attention_dim=32, caption_channels=24
    )
    flux.save_pretrained(folder / "flux" / "transformer")
    sd3.save_pretrained(folder / "sd3" / "transformer", max_shard_size="60KB")
    pixart.save_pretrained(folder / "pixart" / "transformer")
    assert (folder / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    (folder / "torn" / "transformer").mkdir(parents=True)
    _write_without_one_tensor(folder / "flux" / "transformer", folder / "torn" / "transformer")

    t = torch.tensor([0.3, 0.9])
    flux_inputs = {
        "hidden_states": torch.randn(2, 16, 32),
        "encoder_hidden_states": torch.randn(2, 5, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": t,
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    half = torch.bfloat16
    sd3_inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=half),
        "encoder_hidden_states": torch.randn(2, 5, 24, dtype=half),
        "pooled_projections": torch.randn(2, 20, dtype=half),
        "timestep": 1000 * t,
    }
    pixart_inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=half),
        "encoder_hidden_states": torch.randn(2, 5, 24, dtype=half),
        "timestep": 1000 * t,
    }
    return [
        Case(str(folder / "flux"), torch.float32, flux_inputs),
        Case(str(folder / "sd3"), half, sd3_inputs),
        Case(str(folder / "pixart"), half, pixart_inputs),
    ]


def _write_without_one_tensor(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(source / name)
    tensors.pop("proj_out.weight")
    save_file(tensors, target / name)
    (target / "config.json").write_text((source / "config.json").read_text())


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_partitioned_networks_equal_from_pretrained(tmp_path):
    """Bitwise the network diffusers loads, 1/S of the parameters a rank, also after a forward that failed midway."""
    import diffusers

    cases = _miniatures(tmp_path)
    port = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    torch.multiprocessing.spawn(_rank_process, (port, cases, str(tmp_path)), nprocs=WORLD)
    names = ("FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for index, (case, name) in enumerate(zip(cases, names, strict=True)):
        dense = getattr(diffusers, name).from_pretrained(case.folder, subfolder="transformer", dtype=case.dtype)
        with torch.no_grad():
            expected = dense.eval()(**case.inputs, return_dict=False)[0]
        for rank in ranks:
            found = rank[index]
            assert torch.equal(found["output"], expected), name
            assert found["failed"], name
            assert torch.equal(found["again"], expected), name
            assert found["share"] == pytest.approx(1 / WORLD, rel=0.02), name
            assert found["after"] == pytest.approx(1 / WORLD, rel=0.02), name
            buffers = dict(dense.named_buffers())
            assert found["buffers"].keys() == buffers.keys()
            for key, buffer in buffers.items():
                assert found["buffers"][key].dtype == buffer.dtype, key
                assert torch.equal(found["buffers"][key], buffer), key
