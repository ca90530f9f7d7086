"""Shared fixtures: miniature pipeline folders with random weights, and one local Ray cluster for the `ray` lane."""

from __future__ import annotations

import copy
import logging
import os
import runpy
import uuid
from pathlib import Path

import pytest
import torch
from captions import CAPTIONS
from xdist.scheduler import LoadFileScheduling

# One thread here and in every process that the tests start: equal thread counts give equal bits.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
os.environ.setdefault("RAY_AUTH_MODE", "token")  # of every cluster and driver alike; Ray reads it once


class RayTogether(LoadFileScheduling):
    """A file's tests share a process, as its fixtures do, and all of tests/ray share one and its cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> RayTogether:
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that kill processes of the shared cluster come last."""
    items.sort(key=lambda item: item.path.parent.name == "ray" and ("kill" in item.name or "dies" in item.name))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads what another one, or a user, has in the cache."""
    monkeypatch.setenv("RAYDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex[:8]}"))


@pytest.fixture(autouse=True, scope="session")
def _no_store_in_the_tree():
    """MLflow makes its store in the working directory where nobody has named one: a test has lost its own."""
    store = Path("mlflow.db").absolute()
    there = store.exists()
    yield
    assert there or not store.exists(), f"a test has made {store}"


@pytest.fixture(scope="session")
def miniature_parts():
    """Random-weight VAEs, text encoders and tokenizers."""
    from raydistill.shapes import miniatures

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = miniatures.clip_tokenizer(), miniatures.t5_tokenizer()
    return {
        "clip_tokenizer": clip_tokenizer,
        "t5_tokenizer": t5_tokenizer,
        "clip": miniatures.clip_text_encoder(clip_tokenizer),
        "t5": miniatures.t5_text_encoder(t5_tokenizer),
        "teacher_vae": miniatures.teacher_vae(),
        "student_vae": miniatures.student_vae(),
    }


def _randomise_zero_layers(network: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised output layers small random weights, so that nothing is trivially zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.02, generator=generator)
    return network


@pytest.fixture(scope="session")
def flux_folder(miniature_parts, tmp_path_factory) -> Path:
    """A FluxPipeline folder."""
    from diffusers import FluxPipeline

    from raydistill.shapes import miniatures

    p = copy.deepcopy(miniature_parts)
    torch.manual_seed(2)
    network = _randomise_zero_layers(miniatures.flux_transformer())
    p["teacher_vae"].register_to_config(scaling_factor=0.8, shift_factor=0.1)
    folder = tmp_path_factory.mktemp("flux")
    FluxPipeline(
        miniatures.flow_scheduler(),
        p["teacher_vae"],
        p["clip"],
        p["clip_tokenizer"],
        p["t5"],
        p["t5_tokenizer"],
        network,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_folder(miniature_parts, tmp_path_factory) -> Path:
    """A StableDiffusionPipeline folder."""
    from diffusers import StableDiffusionPipeline

    from raydistill.shapes import miniatures

    p = copy.deepcopy(miniature_parts)
    torch.manual_seed(3)
    unet = _randomise_zero_layers(miniatures.student_unet())
    p["student_vae"].register_to_config(scaling_factor=0.9)
    folder = tmp_path_factory.mktemp("sd")
    StableDiffusionPipeline(
        p["student_vae"],
        p["clip"],
        p["clip_tokenizer"],
        unet,
        miniatures.student_scheduler(),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spaces(sd_folder, flux_folder):
    """Student and teacher of the folders above."""
    from raydistill.spaces import load_space

    return load_space(sd_folder), load_space(flux_folder)


@pytest.fixture(scope="module")
def tables(spaces):
    """Conditioning of CAPTIONS, of student and teacher."""
    return [space.encode_prompts(space.load_text(), CAPTIONS) for space in spaces]


@pytest.fixture(scope="session")
def diffusion_folders(tmp_path_factory) -> dict[str, Path]:
    """Pipeline folders of the discrete-path teachers: sdxl, kolors, pixart."""
    import tiny_diffusion_pipelines as tiny

    root = tmp_path_factory.mktemp("diffusion")
    savers = {"sdxl": tiny.save_sdxl, "kolors": tiny.save_kolors, "pixart": tiny.save_pixart}
    return {name: save(root / name) for name, save in savers.items()}


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster for the whole session, of more logical CPUs than the machine has."""
    import ray

    from raydistill.driver.cluster import WITHOUT_DASHBOARD, environment

    with environment(WITHOUT_DASHBOARD):
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    """The address of a server on this machine that speaks S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server):
    """A new empty bucket, `s3://name`; this process and those it starts find the server as a user's would."""
    import boto3

    name = f"raydistill-{uuid.uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", s3_server)
        environment.setenv("AWS_ACCESS_KEY_ID", "tester")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "none")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
        yield f"s3://{name}"


@pytest.fixture
def run_script(monkeypatch, capfd):
    """`run_script(name, *arguments)` -> (exit code, stdout, stderr) of jobs/NAME.py, in this process."""

    def start(name: str, *arguments: object) -> tuple[int, str, str]:
        script = Path(__file__).parents[1] / "jobs" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(script), *map(str, arguments)])
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        try:
            code = runpy.run_path(str(script))["main"]()
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return code, *capfd.readouterr()

    return start
