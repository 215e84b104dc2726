"""Low-rank adapters (LoRA) by PEFT: added to a model, stored in PEFT's format, and merged into the weights served.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config import LoRAConfig
from vzero_core.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
"""Name of the file that PEFT looks for."""
_ADAPTER = "default"


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Put adapters into a model's linear layers; they change nothing yet, and they alone can learn.

    Args:
        model: on the CPU.
        config: rank, scale and layers.
        seed: of the adapters' first weights.

    Raises:
        InputError: `config.target` fits nothing, or what cannot be merged.
    """
    # Here, because its import takes half a second, and most runs have no adapters.
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_peft_config(config), model, _ADAPTER)
        except (ValueError, re.error) as error:
            raise InputError(
                f"optimizer.lora.target must fit linear layers of the student, got {config.target!r}: {error}"
            ) from error
    outside = (model.get_output_embeddings(), model.get_input_embeddings())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (not isinstance(module, Linear) or module in outside):
            raise InputError(
                f"optimizer.lora.target must fit linear layers alone, and not the output layer, got "
                f"{config.target!r}, which fits {name}; narrow it"
            )
    # Its initial weights lie where the layer's are, in training mode, which for them is another word for dropout.
    model.eval()


def merge(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Give the weights that a model without adapters has to have, to compute as one with adapters does.

    Args:
        state: all weights, of layers and adapters.
        config: as the adapters were added.

    Returns:
        Weights under the names of the model without adapters; those without an adapter are not copied.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _is_adapter(name):
            continue
        layer, found, rest = name.rpartition("base_layer.")
        if found and rest == "weight":
            down, up = (state[f"{layer}lora_{part}.{_ADAPTER}.weight"] for part in "AB")
            tensor = tensor + up @ down * (config.alpha / config.rank)
        merged[layer + rest] = tensor
    return merged


def save_adapters(state: Mapping[str, Tensor], config: LoRAConfig, folder: Path) -> None:
    """Write adapters as PEFT does; the model that they belong to is named nowhere.

    Args:
        state: all weights, of layers and adapters.
        config: as the adapters were added.
        folder: where to; it is made.
    """
    folder.mkdir()
    _peft_config(config).save_pretrained(str(folder))
    save_file(
        {_stored(name): value.contiguous() for name, value in state.items() if _is_adapter(name)}, folder / WEIGHTS
    )


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Fill a model's adapters with what `save_adapters` wrote."""
    stored = load_file(folder / WEIGHTS)
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            parameter.copy_(stored[_stored(name)])


def _peft_config(config: LoRAConfig) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=config.target)  # type: ignore[arg-type]


def _is_adapter(name: str) -> bool:
    return f".{_ADAPTER}." in name and ".lora_" in name


def _stored(name: str) -> str:
    return "base_model.model." + name.replace(f".{_ADAPTER}.", ".")
