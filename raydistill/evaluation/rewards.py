"""Reward models and FID by their authors' packages, each in an environment of its own.

The packages pin clashing versions, so none of them is imported by this project's own processes: each runs in a Ray
runtime_env, which Ray builds with pip on the node where it is needed, and this module imports only the standard
library: everything else is imported inside functions. torch is pinned there too, since torchvision belongs to one torch.

| metric | package | entry point | order |
|---|---|---|---|
| hpsv3 | hpsv3 1.0.0 | HPSv3RewardInferencer.reward(image_paths, prompts) | changed between versions: by keyword |
| hpsv2 | hpsv2 1.2.0 | img_score.score(img_path, prompt, cp, hps_version) | image first; one prompt a call |
| imagereward | image-reward 1.5 | ImageReward.load(...).score(prompt, image) | prompt first |
| fid | torch-fidelity 0.4.0 | calculate_metrics(input1, input2, fid=True, ...) | two folders |
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TORCH = ("torch==2.5.1", "torchvision==0.20.1")
_HUGGING_FACE = ("transformers==4.45.2", "huggingface-hub<1", "setuptools<81")

# What each package needs beside what it declares is named too: it would be found missing at import.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "hpsv3": (*_TORCH, "hpsv3==1.0.0", *_HUGGING_FACE, "peft==0.13.2", "accelerate==1.0.1", "trl==0.12.2",
              "deepspeed==0.15.4", "diffusers==0.31.0", "datasets<4", "matplotlib", "tensorboard"),
    # hpsv2's wheel lacks CLIP's vocabulary; open_clip_torch has the same file
    "hpsv2": (*_TORCH, "hpsv2==1.2.0", *_HUGGING_FACE, "open_clip_torch==2.29.0"),
    "imagereward": (*_TORCH, "image-reward==1.5", *_HUGGING_FACE, "clip-anytorch==2.6.0", "accelerate==1.0.1",
                    "diffusers==0.31.0", "peft==0.13.2", "datasets<4"),
    "fid": (*_TORCH, "torch-fidelity==0.4.0"),
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """One file of weights, or a folder of a model.

    Attributes:
        option: how --weights names it.
        repo: of the hub; "" where it is not on the hub.
        file: of the repository; None: the whole model.
        size: for people.
        url: where it is, if not on the hub.
    """

    option: str
    repo: str
    file: str | None
    size: str
    url: str = ""


WEIGHTS: dict[str, tuple[Weights, ...]] = {
    "clipscore": (Weights("clipscore", "openai/clip-vit-large-patch14", None, "1.7 GB"),),
    "pickscore": (
        Weights("pickscore", "yuvalkirstain/PickScore_v1", None, "about 4 GB"),
        Weights("pickscore.processor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None,
                "a few files; no weights are read"),
    ),
    "hpsv3": (
        Weights("hpsv3", "MizzenAI/HPSv3", "HPSv3.safetensors", "about 17 GB"),
        Weights("hpsv3.base", "Qwen/Qwen2-VL-7B-Instruct", None, "about 17 GB"),
    ),
    "hpsv2": (Weights("hpsv2", "xswu/HPSv2", "HPS_v2.1_compressed.pt", "about 2 GB"),),
    "imagereward": (
        Weights("imagereward", "THUDM/ImageReward", "ImageReward.pt", "about 1.8 GB"),
        Weights("imagereward.config", "THUDM/ImageReward", "med_config.json", "1 kB"),
        Weights("imagereward.tokenizer", "google-bert/bert-base-uncased", None, "a few files; no weights are read"),
    ),
    "fid": (
        Weights("fid", "", "weights-inception-2015-12-05-6726825d.pth", "95 MB",
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth"),
    ),
}  # fmt: skip
TOKENIZER_ONLY = {"imagereward.tokenizer", "pickscore.processor"}


def runtime_env(metric: str) -> dict:
    """Ray's description of a metric's environment."""
    # pip's own check would complain of packages of the surrounding environment that nothing here imports
    return {"pip": {"packages": list(ENVIRONMENTS[metric]), "pip_check": False}}


class HPSv3:
    """The mean μ of HPSv3's two outputs (its σ is not a score). Higher is better; about 10 for good pictures."""

    def __init__(self, weights: dict[str, str], device: str) -> None:
        import hpsv3
        from hpsv3 import HPSv3RewardInferencer

        packaged = Path(hpsv3.__file__).parent / "config" / "HPSv3_7B.yaml"
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "HPSv3_7B.yaml")
            config.write_text(with_base_model(packaged.read_text(), weights["hpsv3.base"]))
            self._inferencer = HPSv3RewardInferencer(
                config_path=str(config), checkpoint_path=weights["hpsv3"], device=device
            )

        if not device.startswith("cuda"):  # its head is float32, which only CUDA's autocast joins to the bfloat16 rest
            self._inferencer.model.float()

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        import torch

        with torch.no_grad():
            rewards = self._inferencer.reward(image_paths=list(files), prompts=list(prompts))
        return {"hpsv3": [float(reward[0]) for reward in rewards]}


def with_base_model(config: str, base: str) -> str:
    """HPSv3's configuration with another place of Qwen2-VL. Raises ValueError where it names none."""
    lines = config.split("\n")
    found = [i for i, line in enumerate(lines) if line.startswith("model_name_or_path:")]
    if len(found) != 1:
        raise ValueError("hpsv3's configuration has no single line model_name_or_path")
    lines[found[0]] = f'model_name_or_path: "{base}"'
    return "\n".join(lines)


class HPSv2:
    """HPSv2.1, times 100 as its authors report it."""

    def __init__(self, weights: dict[str, str], device: str) -> None:
        _supply_vocabulary()
        import torch
        from hpsv2 import img_score

        # it would fetch 4 GB of CLIP's own weights, all of which the checkpoint then replaces
        create = img_score.create_model_and_transforms
        img_score.create_model_and_transforms = lambda name, _pretrained, **settings: create(name, None, **settings)
        # `score` reads the checkpoint anew at each call, and takes one prompt a call
        torch.load = functools.lru_cache(maxsize=1)(torch.load)
        img_score.device = device
        self._rate, self._checkpoint = img_score.score, weights["hpsv2"]

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        def one(file: str, prompt: str) -> float:
            (value,) = self._rate(img_path=[file], prompt=prompt, cp=self._checkpoint, hps_version="v2.1")
            return 100 * float(value)

        return {"hpsv2": [one(file, prompt) for file, prompt in zip(files, prompts, strict=True)]}


def _supply_vocabulary() -> None:
    """Put CLIP's vocabulary where hpsv2 looks for it, before anything of hpsv2 that opens it is imported."""
    name = "bpe_simple_vocab_16e6.txt.gz"
    place = Path(importlib.util.find_spec("hpsv2").origin).parent / "src" / "open_clip" / name
    if not place.is_file():
        shutil.copyfile(Path(importlib.util.find_spec("open_clip").origin).parent / name, place)


class ImageReward:
    """ImageReward-v1.0, standardised by its authors: 0 is the mean of their data."""

    def __init__(self, weights: dict[str, str], device: str) -> None:
        import ImageReward as RM
        from ImageReward.models.BLIP import blip

        # BLIP asks the hub for its tokenizer; the folder that was checked is given instead
        tokenizer = weights["imagereward.tokenizer"]
        from_pretrained = blip.BertTokenizer.from_pretrained
        blip.BertTokenizer.from_pretrained = lambda name, *args, **kwargs: from_pretrained(tokenizer, *args, **kwargs)
        try:
            self._model = RM.load(name=weights["imagereward"], device=device, med_config=weights["imagereward.config"])
        finally:
            blip.BertTokenizer.from_pretrained = from_pretrained

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float]]:
        import torch

        with torch.no_grad():
            pairs = zip(files, prompts, strict=True)
            return {"imagereward": [float(self._model.score(prompt=prompt, image=file)) for file, prompt in pairs]}


REWARDS = {"hpsv3": HPSv3, "hpsv2": HPSv2, "imagereward": ImageReward}


def inception_fid(pictures: str, reference: str, weights: dict[str, str], device: str, batch_size: int = 32) -> float:
    """FID between two folders of pictures (Heusel et al. 2017), by torch-fidelity's port of the TensorFlow Inception."""
    import torch_fidelity

    result = torch_fidelity.calculate_metrics(
        input1=pictures,
        input2=reference,
        fid=True,
        cuda=device.startswith("cuda"),
        batch_size=batch_size,
        feature_extractor_weights_path=weights["fid"],
        cache=False,
        verbose=False,
    )
    return float(result["frechet_inception_distance"])
