"""What a model's configuration says of its size: parameters, and what one token costs; no weights are read."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from tasks.adapters.models import model_folder
from tasks.adapters.packed import takes_packed_rows
from tasks.config import EMBEDDED
from vzero_core.errors import InputError

DELTA_CHUNK = 64
"""Tokens of a chunk in transformers' gated delta rule."""
_PER_TOKEN = re.compile("merger|connector|projector")
"""Names in a vision tower of what every visual token passes once; every patch passes the rest."""


@dataclass(frozen=True)
class Part:
    """A parameter, or the adapter that a linear layer may get.

    Attributes:
        name: of the parameter, or of the layer.
        size: numbers in it; of an adapter, for rank 1.
        place: where in the model it is.
    """

    name: str
    size: int
    place: Literal["language", "vision", "embedding", "output"]


@dataclass(frozen=True)
class LanguageShape:
    """The language part, but for embedding and output layer.

    Attributes:
        num_parameters: of its layers and its last norm.
        num_active: of those, what one token passes: not all of the experts.
        hidden: size of a token's hidden state.
        mlp: inner size of its feed-forward layers; with experts, of those that one token passes, with their inputs.
        queries: heads times their size.
        keys: key heads times their size; values are as large.
        key_heads: how many they are.
        gated: whether attention's output is gated, as in Qwen3.5.
        num_full: layers with full attention.
        num_linear: layers with linear attention (gated delta rule).
        linear_heads: value heads of linear attention.
        linear_key: size of one of its key heads.
        linear_value: size of one of its value heads.
        conv: channels times kernel of its convolution.
    """

    num_parameters: int
    num_active: float
    hidden: int
    mlp: int
    queries: int
    keys: int
    key_heads: int
    gated: bool
    num_full: int
    num_linear: int = 0
    linear_heads: int = 0
    linear_key: int = 0
    linear_value: int = 0
    conv: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of both kinds."""
        return self.num_full + self.num_linear


@dataclass(frozen=True)
class VisionShape:
    """The vision tower.

    Attributes:
        num_parameters: of what every patch passes: patch embedding and blocks.
        num_merger_parameters: of what every visual token passes.
        hidden: size of a patch's hidden state.
        mlp: inner size of its feed-forward layers.
        gated: whether those have three matrices instead of two.
        num_layers: blocks.
        num_full: blocks whose attention sees the whole image.
        window: patches that the other blocks' attention sees.
        merge: patches of a visual token.
        patch: numbers in a patch's pixels.
    """

    num_parameters: int
    num_merger_parameters: int
    hidden: int
    mlp: int
    gated: bool
    num_layers: int
    num_full: int
    window: int
    merge: int
    patch: int


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model's sizes.

    Attributes:
        num_parameters: all of them, shared ones once.
        language: the language part.
        vision: the vision tower.
        embedding: parameters of the input embedding.
        output: parameters of the output layer, also where it shares them with the embedding.
        tied: whether it does.
        vocabulary: tokens that the output layer knows.
        context: tokens that the model takes.
        packed: whether training computes a prompt once for its responses.
        parameters: all of them.
        adapters: what linear layers may get, the output layer left out.
    """

    num_parameters: int
    language: LanguageShape
    vision: VisionShape
    embedding: int
    output: int
    tied: bool
    vocabulary: int
    context: int
    packed: bool
    parameters: tuple[Part, ...]
    adapters: tuple[Part, ...]

    def language_flops(self, num_tokens: float, num_pairs: float) -> float:
        """Give the operations of a forward pass through the language part's layers.

        2 x parameters x tokens, 4 x (heads x size) for each pair of a query and a key in each layer of full attention,
        and what the gated delta rule computes within chunks of 64 tokens and between them.

        Args:
            num_tokens: tokens that are computed.
            num_pairs: query times key positions, as dense matrices have them: a causal prompt of P counts P x P.
        """
        part = self.language
        key, value = part.linear_key, part.linear_value
        delta = part.linear_heads * (2 * DELTA_CHUNK * (3 * key + 2 * value) + 6 * key * value)
        return (
            2 * part.num_active * num_tokens
            + 4 * part.queries * part.num_full * num_pairs
            + delta * part.num_linear * num_tokens
        )

    def vision_flops(self, num_tokens: float) -> float:
        """Give the operations of a forward pass of one image.

        Args:
            num_tokens: its visual tokens, as the language part sees them.
        """
        part = self.vision
        patches = num_tokens * part.merge
        seen = part.num_full * patches + (part.num_layers - part.num_full) * min(part.window, patches)
        return (
            2 * part.num_parameters * patches
            + 2 * part.num_merger_parameters * num_tokens
            + 4 * part.hidden * patches * seen
        )

    def output_flops(self, num_tokens: float) -> float:
        """Give the operations of the output layer's logits at some positions."""
        return 2 * self.output * num_tokens

    def cache_bytes(self, num_tokens: float, num_rows: float, size: int) -> float:
        """Give the bytes of keys, values and states after a forward pass.

        Args:
            num_tokens: of all rows together.
            num_rows: sequences; each has a state in every layer of linear attention, in float32.
            size: bytes of a number.
        """
        part = self.language
        states = part.num_linear * (4 * part.linear_heads * part.linear_key * part.linear_value + size * part.conv)
        return 2 * part.keys * part.num_full * size * num_tokens + states * num_rows


def read_shape(path: str) -> ModelShape:
    """Give the shape of a configured model; its folder needs no weights.

    Args:
        path: folder with a config.json, or an embedded model's name.

    Raises:
        InputError: there is no config.json, or it describes no image-text-to-text model of the usual build.
    """
    folder = model_folder(path) if path.startswith(EMBEDDED) else Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {path} must have a config.json; it has none: download the model there")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        return _shape_of(config, model)
    # What a family lacks shows in many ways: a setting that has another name, a layer that is not there.
    except (ValueError, OSError, AttributeError, TypeError, LookupError, ImportError, RuntimeError) as error:
        raise InputError(
            f"model folder {path} must describe an image-text-to-text model whose sizes can be read, but its "
            f"config.json gives {type(error).__name__}: {error}"
        ) from error


def _shape_of(config: PreTrainedConfig, model: Any) -> ModelShape:
    text = config.get_text_config()
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = {id(part) for part in model.get_decoder().parameters()}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}

    def place(parameter: torch.Tensor) -> Literal["language", "vision", "embedding", "output"]:
        if parameter is embedding.weight:
            return "embedding"
        if parameter is output.weight:
            return "output"
        return "language" if id(parameter) in decoder else "vision"

    named = list(model.named_parameters())
    # A table of positions is looked up, not multiplied.
    seen = [(name, part) for name, part in named if place(part) == "vision" and id(part) not in tables]
    merger = sum(part.numel() for name, part in seen if _PER_TOKEN.search(name))
    size = sum(part.numel() for _, part in named if place(part) == "language")
    chosen = getattr(text, "num_experts_per_tok", None) or math.inf
    experts = [part for name, part in named if "experts." in name and part.dim() == 3]
    idle = sum(part.numel() * max(0.0, 1 - chosen / len(part)) for part in experts)
    return ModelShape(
        num_parameters=sum(part.numel() for _, part in named),
        language=_language(text, size, size - idle),
        vision=_vision(config, sum(part.numel() for _, part in seen) - merger, merger),
        embedding=embedding.weight.numel(),
        output=output.weight.numel(),
        tied=embedding.weight is output.weight,
        vocabulary=text.vocab_size,
        context=text.max_position_embeddings,
        packed=takes_packed_rows(model),
        parameters=tuple(Part(name, part.numel(), place(part)) for name, part in named),
        adapters=tuple(
            Part(name, part.in_features + part.out_features, place(part.weight))
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear) and part is not output
        ),
    )


def _language(text: PreTrainedConfig, num_parameters: int, num_active: float) -> LanguageShape:
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    num_linear = kinds.count("linear_attention")
    linear: dict[str, int] = {}
    if num_linear:
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = text.linear_num_value_heads * text.linear_value_head_dim
        linear = {
            "num_linear": num_linear,
            "linear_heads": text.linear_num_value_heads,
            "linear_key": text.linear_key_head_dim,
            "linear_value": text.linear_value_head_dim,
            "conv": text.linear_conv_kernel_dim * (2 * keys + values),
        }
    return LanguageShape(
        num_parameters=num_parameters,
        num_active=num_active,
        hidden=text.hidden_size,
        mlp=_inner_size(text),
        queries=text.num_attention_heads * head,
        keys=text.num_key_value_heads * head,
        key_heads=text.num_key_value_heads,
        gated=text.model_type.startswith("qwen3_5"),
        num_full=len(kinds) - num_linear,
        **linear,
    )


def _inner_size(text: Any) -> int:
    chosen = getattr(text, "num_experts_per_tok", None)
    if not chosen:
        return int(text.intermediate_size)
    # Each expert of a token has a copy of its hidden state.
    own = chosen * ((getattr(text, "moe_intermediate_size", None) or text.intermediate_size) + text.hidden_size)
    return int(max(own + getattr(text, "shared_expert_intermediate_size", 0), getattr(text, "intermediate_size", 0)))


def _vision(config: Any, num_parameters: int, num_merger_parameters: int) -> VisionShape:
    part = config.vision_config
    depth = getattr(part, "depth", None) or part.num_hidden_layers
    # Qwen2-VL's hidden size is the language part's.
    hidden = getattr(part, "embed_dim", None) or part.hidden_size
    full = getattr(part, "fullatt_block_indexes", None)
    return VisionShape(
        num_parameters=num_parameters,
        num_merger_parameters=num_merger_parameters,
        hidden=hidden,
        mlp=getattr(part, "intermediate_size", None) or int(hidden * part.mlp_ratio),
        gated=full is not None,
        num_layers=depth,
        num_full=depth if full is None else len(full),
        window=0 if full is None else (part.window_size // part.patch_size) ** 2,
        merge=_merge(config, part),
        patch=3 * getattr(part, "temporal_patch_size", 1) * _area(part.patch_size),
    )


def _merge(config: Any, part: Any) -> int:
    """Give the patches of a visual token, which each family says in its own way."""
    side = getattr(part, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    if side or (side := getattr(config, "scale_factor", None)):
        return int(side * side)
    if ratio := getattr(config, "downsample_ratio", None):
        return int(round(1 / ratio) ** 2)
    if num_tokens := getattr(config, "mm_tokens_per_image", None):
        return int(_area(part.image_size) // _area(part.patch_size) // num_tokens)
    return 1


def _area(side: int | list[int]) -> int:
    return side**2 if isinstance(side, int) else math.prod(side)
