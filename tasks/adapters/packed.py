"""A prompt and all of its responses in one row, [prompt][response 1]..[response G]: training pays for the prompt once.

Attention computes the prompt causally, then the responses as G rows that continue it; linear attention computes the
prompt, then copies its state to the responses. All else in a language model looks at one token at a time. There is no
cache, so gradient checkpointing computes the same again.
Legend: N prompts of P tokens, G responses each, B = N * G; T tokens a response, S of them read; H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.adapters.forward import prompt_positions
from tasks.adapters.prompts import ModelInputs, stack

ATTENTION = "packed"
"""The name that the attention below is registered under."""
MIN_STEPS = 2
"""Linear attention continues a single token by a kernel that has no gradient."""


@dataclass(frozen=True)
class Packing:
    """The layout of a row.

    Attributes:
        num_prompt: P.
        num_responses: G.
        num_steps: S.
    """

    num_prompt: int
    num_responses: int
    num_steps: int


def enable_packing(model: PreTrainedModel) -> None:
    """Let a model's language part take packed rows; all other calls are computed as before.

    Args:
        model: its language part's attention is transformers' "sdpa".
    """
    decoder = model.get_decoder()
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION)
    for name, layer in decoder.named_modules():
        if name.endswith(".linear_attn"):
            # On the object, for good: gradient checkpointing calls it again in the backward pass.
            layer.forward = partial(_linear_attention, layer.forward)


def packed_hidden(model: PreTrainedModel, prompts: Sequence[ModelInputs], responses: Tensor) -> Tensor:
    """Give the last hidden states that predict each response token, the first one included.

    Args:
        model: a model after `enable_packing`.
        prompts: N encoded prompts of equal signature; each is one row.
        responses: [B, T] int64, B = N * G in the prompts' order, padded on the right with any text token.

    Returns:
        [B, T, H]; row k of a response depends on the prompt and its tokens before k alone.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in stack(prompts).items()}
    positions, next_position = prompt_positions(model, inputs)
    inputs.pop("mm_token_type_ids", None)
    input_ids = inputs.pop("input_ids")
    num_prompts, num_prompt = input_ids.shape
    num_tokens = responses.shape[1]
    # A response's last token predicts nothing; the last is read again where the others are too few.
    steps = torch.arange(max(num_tokens - 1, MIN_STEPS), device=model.device)
    read = responses.to(model.device)[:, steps.clamp(max=num_tokens - 1)]
    packing = Packing(num_prompt, len(responses) // num_prompts, len(steps))
    continued = next_position[:, None] + steps.repeat(packing.num_responses)
    hidden = model.base_model(
        **inputs,
        input_ids=torch.cat([input_ids, read.reshape(num_prompts, -1)], dim=1),
        position_ids=torch.cat([positions, continued.expand(*positions.shape[:-1], -1)], dim=-1),
        use_cache=False,
        packing=packing,
    ).last_hidden_state
    first = hidden[:, num_prompt - 1 : num_prompt].repeat_interleave(packing.num_responses, dim=0)
    rest = hidden[:, num_prompt:].reshape(len(responses), len(steps), -1)
    return torch.cat([first, rest[:, : num_tokens - 1]], dim=1)


def takes_packed_rows(model: PreTrainedModel) -> bool:
    """Tell whether a model's layers are of the kinds that packed rows are made for.

    Attention in windows and any attention but transformers' "sdpa" are not: the model would not compute as before.
    """
    config = model.get_decoder().config
    layer_types = getattr(config, "layer_types", None) or ()
    return config._attn_implementation == "sdpa" and set(layer_types) <= {"full_attention", "linear_attention"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: [N, heads, P + G * S, D] in, [N, P + G * S, heads, D] out."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length, num_steps = packing.num_prompt, packing.num_steps
    q_prompt, k_prompt, v_prompt = (states[:, :, :length] for states in (query, key, value))
    prompt, _ = sdpa_attention_forward(module, q_prompt, k_prompt, v_prompt, None, **kwargs)
    # Query heads that share a key head stand below one another, so that keys and values are not copied for each.
    own = _own(query, packing)
    steps = torch.ones(num_steps, length + num_steps, dtype=torch.bool, device=query.device).tril(length)
    responses = nn.functional.scaled_dot_product_attention(
        own.reshape(len(own), key.shape[1], -1, own.shape[-1]),
        _continued(key, packing),
        _continued(value, packing),
        attn_mask=steps.repeat(query.shape[1] // key.shape[1], 1),
        dropout_p=kwargs["dropout"],
        scale=kwargs["scaling"],
    )
    responses = responses.reshape(len(query), -1, query.shape[1], num_steps, value.shape[-1]).transpose(2, 3)
    return torch.cat([prompt, responses.flatten(1, 2)], dim=1), None


def _own(states: Tensor, packing: Packing) -> Tensor:
    """Cut a row's responses apart: [N, heads, P + G * S, D] to [N * G, heads, S, D]."""
    own: Tensor = states[:, :, packing.num_prompt :].unflatten(2, (packing.num_responses, packing.num_steps))
    return own.transpose(1, 2).flatten(0, 1)


def _continued(states: Tensor, packing: Packing) -> Tensor:
    """Put a copy of the prompt before each response: [N, heads, P + G * S, D] to [N * G, heads, P + S, D]."""
    prompt = states[:, :, : packing.num_prompt].repeat_interleave(packing.num_responses, dim=0)
    return torch.cat([prompt, _own(states, packing)], dim=2)


class _State:
    """What a linear-attention layer asks of a cache, for one layer and never written in place."""

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.recurrent: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent

    def update_conv_state(self, states: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        states = states if self.conv is None else torch.cat([self.conv, states], dim=-1)
        self.conv = states[..., -conv_kernel_size:]
        return states

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        self.recurrent = state

    def fork(self, num_rows: int) -> None:
        assert self.conv is not None, "the layer left its states here"
        assert self.recurrent is not None, "the layer left its states here"
        self.conv = self.conv.repeat_interleave(num_rows, dim=0)
        self.recurrent = self.recurrent.repeat_interleave(num_rows, dim=0)


def _linear_attention(
    forward: Callable[..., Tensor], hidden_states: Tensor, *, packing: Packing | None = None, **kwargs: Any
) -> Tensor:
    if packing is None:
        return forward(hidden_states, **kwargs)
    kwargs["cache_params"] = state = _State()
    prompt = forward(hidden_states[:, : packing.num_prompt], **kwargs)
    state.fork(packing.num_responses)
    own = hidden_states[:, packing.num_prompt :].reshape(-1, packing.num_steps, hidden_states.shape[-1])
    responses = forward(own, **kwargs)
    return torch.cat([prompt, responses.reshape(len(prompt), -1, prompt.shape[-1])], dim=1)
