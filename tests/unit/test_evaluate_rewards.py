"""Adapters of the reward packages: what they call, in which order, with which weights; and weights that are missing.

The packages need environments of their own, so their entry points are written down here as they are published: the
same names, order and quirks. Where a package index can be asked, the published wheels themselves are compared.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from raydistill.errors import InputError
from raydistill.evaluation import rewards
from raydistill.evaluation.rewards import ENVIRONMENTS, REWARDS, WEIGHTS, inception_fid, runtime_env, with_base_model
from raydistill.evaluation.weights import find_weights, parse_weights

FILES, PROMPTS = ["/p/0.png", "/p/11.png"], ["a", "bbb"]

# module -> source, with the published signatures
PACKAGES = {
    "hpsv3/__init__.py": """
import torch
class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device='cuda', differentiable=False):
        self.told = (open(config_path).read(), checkpoint_path, device)
        self.model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    def reward(self, image_paths, prompts):
        assert image_paths[0].endswith('.png')
        return torch.tensor([[float(len(i)), -1.0 * len(p)] for i, p in zip(image_paths, prompts)])
""",
    "hpsv3/config/HPSv3_7B.yaml": 'rm_head_type: "ranknet"\nmodel_name_or_path: "Qwen/Qwen2-VL-7B-Instruct"\nlora_r: 512\n',
    "hpsv2/__init__.py": "",
    "hpsv2/src/open_clip/__init__.py": "",
    "hpsv2/img_score.py": """
import os, torch
import hpsv2
device = None
vocabulary = os.path.join(os.path.dirname(hpsv2.__file__), 'src', 'open_clip', 'bpe_simple_vocab_16e6.txt.gz')
assert os.path.isfile(vocabulary)
model_dict = {}
def create_model_and_transforms(name, pretrained, precision, device):
    assert pretrained is None, 'fetches 4 GB'
    return name, None, None
def score(img_path, prompt, cp=None, hps_version='v2.0'):
    assert isinstance(img_path, list) and isinstance(prompt, str)
    create_model_and_transforms('ViT-H-14', 'laion2B-s32B-b79K', precision='amp', device=device)
    checkpoint = torch.load(cp, map_location=device)
    checkpoint['reads'] = checkpoint.get('reads', 0) + 1
    return [checkpoint['scale'] * len(prompt) + (hps_version == 'v2.1') + checkpoint['reads']]
""",
    "open_clip/__init__.py": "",
    "open_clip/bpe_simple_vocab_16e6.txt.gz": "words",
    "ImageReward/__init__.py": """
from ImageReward.models.BLIP import blip
class Model:
    def __init__(self, *told):
        self.told = told
    def score(self, prompt, image):
        assert image.endswith('.png')
        return len(image) - 10.0 * len(prompt)
def load(name='ImageReward-v1.0', device='cpu', download_root=None, med_config=None):
    return Model(name, device, med_config, blip.BertTokenizer.from_pretrained('bert-base-uncased'))
""",
    "ImageReward/models/__init__.py": "",
    "ImageReward/models/BLIP/__init__.py": "",
    "ImageReward/models/BLIP/blip.py": """
class BertTokenizer:
    @classmethod
    def from_pretrained(cls, name):
        return name
""",
    "torch_fidelity/__init__.py": """
def calculate_metrics(**kwargs):
    known = {'input1', 'input2', 'fid', 'cuda', 'batch_size', 'feature_extractor_weights_path', 'cache', 'verbose'}
    assert set(kwargs) == known and kwargs['fid'] is True
    calculate_metrics.told = kwargs
    return {'frechet_inception_distance': 12.5}
""",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name, text in PACKAGES.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    names = ("hpsv3", "hpsv2", "open_clip", "ImageReward", "torch_fidelity")
    yield tmp_path / "site"
    for module in [m for m in sys.modules if m.split(".")[0] in names]:
        del sys.modules[module]


def test_hpsv3_gets_images_and_prompts_by_name_and_gives_the_mean(packages):
    reward = rewards.HPSv3({"hpsv3": "/w/HPSv3.safetensors", "hpsv3.base": "/models/qwen"}, "cpu")
    assert reward(FILES, PROMPTS) == {"hpsv3": [8.0, 9.0]}
    config, checkpoint, device = reward._inferencer.told
    assert config.splitlines() == ['rm_head_type: "ranknet"', 'model_name_or_path: "/models/qwen"', "lora_r: 512"]
    assert (checkpoint, device) == ("/w/HPSv3.safetensors", "cpu")
    assert reward._inferencer.model.weight.dtype == torch.float32


def test_a_configuration_of_hpsv3_without_its_base_model_is_refused():
    with pytest.raises(ValueError, match="no single line model_name_or_path"):
        with_base_model("rm_head_type: ranknet\n", "/x")


def test_hpsv2_is_version_2_1_times_100_and_reads_its_checkpoint_once(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", torch.load)  # the adapter replaces it in its own process
    torch.save({"scale": 0.125}, tmp_path / "hps.pt")
    reward = rewards.HPSv2({"hpsv2": str(tmp_path / "hps.pt")}, "cpu")
    # 1 for v2.1; the count of uses goes on only in an object that was not read anew
    assert reward(FILES, PROMPTS) == {"hpsv2": [100 * (0.125 + 1 + 1), 100 * (0.375 + 1 + 2)]}
    assert (packages / "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz").read_text() == "words"


def test_imagereward_gets_prompt_and_image_by_name(packages):
    weights = {"imagereward": "/w/IR.pt", "imagereward.config": "/w/med.json", "imagereward.tokenizer": "/w/bert"}
    reward = rewards.ImageReward(weights, "cpu")
    assert reward(FILES, PROMPTS) == {"imagereward": [8 - 10.0, 9 - 30.0]}
    assert reward._model.told == ("/w/IR.pt", "cpu", "/w/med.json", "/w/bert")


def test_fid_hands_over_both_folders_and_the_weights(packages):
    assert inception_fid("/a", "/b", {"fid": "/w/inception.pth"}, "cuda:0") == 12.5
    import torch_fidelity

    told = torch_fidelity.calculate_metrics.told
    assert (told["input1"], told["input2"], told["cuda"]) == ("/a", "/b", True)
    assert told["feature_extractor_weights_path"] == "/w/inception.pth"


def test_every_reward_has_an_environment_that_pins_its_package_and_torch():
    assert set(ENVIRONMENTS) == {*REWARDS, "fid"}
    for metric in ENVIRONMENTS:
        packages = runtime_env(metric)["pip"]["packages"]
        assert {"torch", "torchvision"} <= {package.split("==")[0] for package in packages}


# -- the published packages -------------------------------------------------------------------------------

ENTRY_POINTS = {  # wheel -> (file, class or None, function, arguments that the adapter names)
    "hpsv3==1.0.0": [
        ("hpsv3/inference.py", "HPSv3RewardInferencer", "__init__", {"config_path", "checkpoint_path", "device"}),
        ("hpsv3/inference.py", "HPSv3RewardInferencer", "reward", {"image_paths", "prompts"}),
    ],
    "hpsv2==1.2.0": [("hpsv2/img_score.py", None, "score", {"img_path", "prompt", "cp", "hps_version"})],
    "image-reward==1.5": [
        ("ImageReward/utils.py", None, "load", {"name", "device", "med_config"}),
        ("ImageReward/ImageReward.py", "ImageReward", "score", {"prompt", "image"}),
    ],
    "torch-fidelity==0.4.0": [("torch_fidelity/metrics.py", None, "calculate_metrics", set())],
}


@pytest.mark.parametrize("package", ENTRY_POINTS)
def test_the_published_package_has_the_entry_points_that_the_adapter_calls(package, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--retries",
        "0",
        "-d",
        tmp_path,
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"{package} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    assert any(package in packages for packages in ENVIRONMENTS.values())
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for file, owner, function, named in ENTRY_POINTS[package]:
            tree = ast.parse(files.read(file).decode())
            if owner is not None:
                (tree,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
            (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
            assert named <= {argument.arg for argument in found.args.args}, (file, function)
        if package.startswith("torch-fidelity"):
            defaults = files.read("torch_fidelity/defaults.py").decode()
            for name in ("input1", "input2", "fid", "cuda", "batch_size", "feature_extractor_weights_path", "cache"):
                assert f'"{name}"' in defaults


# -- weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No hub, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ("clipscore", ["openai/clip-vit-large-patch14 (1.7 GB)", "--weights clipscore=FOLDER"]),
        ("hpsv3", ["HPSv3.safetensors of MizzenAI/HPSv3", "`hf download MizzenAI/HPSv3 HPSv3.safetensors`"]),
        ("hpsv2", ["HPS_v2.1_compressed.pt of xswu/HPSv2", "--weights hpsv2=FILE"]),
        ("imagereward", ["ImageReward.pt of THUDM/ImageReward", "--weights imagereward=FILE"]),
        ("fid", ["torch/hub/checkpoints/weights-inception", "https://github.com/toshas", "--weights fid=FILE"]),
    ],
)
def test_missing_weights_say_how_to_get_them(metric, parts, offline):
    with pytest.raises(InputError) as error:
        find_weights(metric, {})
    assert f"metric {metric}: its weights" in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_named_weights_are_taken(offline, tmp_path):
    (tmp_path / "ir.pt").touch()
    (tmp_path / "bert").mkdir()
    (tmp_path / "med_config.json").touch()
    named = parse_weights(
        [f"imagereward={tmp_path}/ir.pt", f"imagereward.config={tmp_path}", f"imagereward.tokenizer={tmp_path}/bert"]
    )
    assert find_weights("imagereward", named) == {
        "imagereward": f"{tmp_path}/ir.pt",
        "imagereward.config": f"{tmp_path}/med_config.json",  # found in the folder that was named
        "imagereward.tokenizer": f"{tmp_path}/bert",
    }
    with pytest.raises(InputError, match=r"--weights imagereward=.*bert: must be a file"):
        find_weights("imagereward", named | {"imagereward": f"{tmp_path}/bert"})
    with pytest.raises(InputError, match=r"--weights hpsv2=./x.pt: no such file or folder"):
        find_weights("hpsv2", {"hpsv2": "./x.pt"})


def test_another_repository_can_be_named(offline):
    with pytest.raises(InputError, match="clip-vit-base-patch32"):
        find_weights("clipscore", {"clipscore": "openai/clip-vit-base-patch32"})


def test_torch_homes_inception_is_found(offline, tmp_path):
    file = Path(tmp_path, "torch", "hub", "checkpoints", WEIGHTS["fid"][0].file)
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_weights("fid", {}) == {"fid": str(file)}
