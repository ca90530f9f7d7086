"""A ComfyUI workflow that draws with a single-file student, in ComfyUI's API format.

Nodes and inputs are those of ComfyUI's own source (`nodes.py`, `comfy_extras/nodes_custom_sampler.py`,
`nodes_model_advanced.py`). The project has not run ComfyUI.
"""

from __future__ import annotations

from typing import Any

Node = dict[str, Any]


def workflow(file: str, start_timestep: int, sigma: float, prediction: str, side: int) -> dict[str, Node]:
    """One Euler step from `sigma` to 0 without guidance: the network's x_0 at the start timestep.

    `KSampler` can start at the last timestep alone, so sampler and sigmas are given by nodes of their own.
    `KarrasScheduler` with one step returns [sigma_max, 0]. At the last timestep ComfyUI takes noise · sqrt(1 + sigma²)
    for the start, so the network sees plain noise; else noise · sigma. That is what the students were trained on.

    Args:
        file: name of the checkpoint in ComfyUI's `models/checkpoints/`.
        sigma: noise over signal at the start timestep.
        prediction: "epsilon" or "v_prediction".
        side: of the picture, in pixels.
    """

    def node(kind: str, title: str, **inputs: Any) -> Node:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}

    sampling = "v_prediction" if prediction == "v_prediction" else "eps"
    return {
        "1": node("CheckpointLoaderSimple", f"one-step student, t = {start_timestep}", ckpt_name=file),
        "2": node("ModelSamplingDiscrete", "what the network predicts", model=["1", 0], sampling=sampling, zsnr=False),
        "3": node("CLIPTextEncode", "prompt", clip=["1", 1], text="a lighthouse at dusk"),
        "4": node("CLIPTextEncode", "not used: CFG is 1", clip=["1", 1], text=""),
        "5": node("EmptyLatentImage", "size", width=side, height=side, batch_size=1),
        "6": node("KSamplerSelect", "Euler", sampler_name="euler"),
        "7": node(
            "KarrasScheduler",
            "one step from sigma to 0",
            steps=1,
            sigma_max=round(sigma, 6),
            sigma_min=round(sigma, 6),
            rho=7.0,
        ),
        "8": node(
            "SamplerCustom",
            "CFG 1: no guidance",
            model=["2", 0],
            add_noise=True,
            noise_seed=0,
            cfg=1.0,
            positive=["3", 0],
            negative=["4", 0],
            sampler=["6", 0],
            sigmas=["7", 0],
            latent_image=["5", 0],
        ),
        "9": node("VAEDecode", "picture", samples=["8", 0], vae=["1", 2]),
        "10": node("SaveImage", "save", images=["9", 0], filename_prefix=file.removesuffix(".safetensors")),
    }
