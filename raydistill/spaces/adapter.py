"""A LoRA on a frozen network, by peft: W + B A, of which A and B alone are trained (arXiv 2106.09685).

Alpha is the rank, so that the product is added as it is. B begins at zero: the network begins as it was.
A network without a LoRA is a whole one, and everything here says so of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from raydistill.errors import InputError

NAME = "default"  # peft's own, of an adapter that is given none
_OF_LORA = ".lora_"  # in the names of its tensors
_AROUND = ".base_layer."  # in the names of a layer's own tensors, once it is adapted


def has_lora(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def add_lora(network: nn.Module, rank: int, targets: Sequence[str], seed: int = 0) -> None:
    """Freeze a network of diffusers in place, and add a LoRA that is trained.

    Args:
        targets: layers, by the ends of their names: linear ones and convolutions.
        seed: of A. No other random number is drawn: the generator stays as it was.

    Raises:
        InputError: no layer has such a name, or one is of another kind.
    """
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"no layer of a {type(network).__name__} is named {target!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(config, NAME)
    except ValueError as error:  # a layer that has no LoRA, such as a norm
        raise InputError(str(error).split(". ")[0]) from None


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of what learns: the LoRA, or all of a whole network."""
    adapted = has_lora(network)
    return {name: p for name, p in network.named_parameters() if not adapted or _OF_LORA in name}


def copy_of(network: nn.Module) -> nn.Module:
    """A copy that shares the frozen weights below a LoRA; of a whole network everything is copied."""
    own = {id(parameter) for parameter in trained(network).values()}
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if id(p) not in own})


# -- weights as they are kept ------------------------------------------------------------------------------


def own_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a network: the LoRA alone, or everything."""
    state = network.state_dict()
    return {name: value for name, value in state.items() if _OF_LORA in name} if has_lora(network) else state


def load_own_state(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take back what `own_state` gave. Raises RuntimeError: tensors are missing, unknown or of another shape."""
    wrong = sorted(own_state(network).keys() ^ state.keys())
    if has_lora(network) and wrong:
        raise RuntimeError(f"{len(wrong)} tensors are missing or unknown, the first is {wrong[0]}")
    network.load_state_dict(state, strict=not has_lora(network))


@torch.no_grad()
def merged_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of the plain network, with the LoRA added to its layers, on the CPU. The network stays as it is."""
    if not has_lora(network):
        return {name: value.detach().to("cpu") for name, value in network.state_dict().items()}
    plain = {
        name.replace(_AROUND, "."): value.detach().to("cpu")
        for name, value in network.state_dict().items()
        if _OF_LORA not in name
    }
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + layer.get_delta_weight(NAME).to("cpu")
    return plain


def lora_state(network: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """(tensors as diffusers names them, configuration) of a network's LoRA, for `save_lora_weights`; on the CPU."""
    state = get_peft_model_state_dict(network, adapter_name=NAME)
    config = network.peft_config[NAME].to_dict()
    return {name: value.detach().to("cpu").contiguous() for name, value in state.items()}, config
