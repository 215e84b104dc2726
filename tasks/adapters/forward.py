"""A model's logits at response positions, the prompt computed once for all of its responses.

Prompts of one batch have equal length, so nothing is padded on the left and no attention mask is needed: that holds
for every family, linear attention included. Responses are padded on the right, where causality hides the padding.
Legend: N prompts, G responses each, B = N * G, P prompt tokens, T response tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedModel

from tasks.adapters.prompts import ModelInputs, stack


@dataclass
class Prefix:
    """A prompt batch after its forward pass, forked to its responses.

    Attributes:
        cache: keys, values and states of the prompts, B rows.
        logits: [B, V]; of each response's first token.
        next_position: [B] int64; position of each response's first token.
        num_position_rows: 3 where a position is (time, height, width), else 0.
    """

    cache: DynamicCache
    logits: torch.Tensor
    next_position: torch.Tensor
    num_position_rows: int

    def positions(self, start: int, length: int) -> torch.Tensor:
        """Give the position ids of response tokens start .. start + length - 1; [B, T], or [3, B, T]."""
        steps = torch.arange(start, start + length, device=self.next_position.device)
        positions_BT = self.next_position[:, None] + steps[None]
        return positions_BT.expand(self.num_position_rows, -1, -1) if self.num_position_rows else positions_BT


def prompt_positions(model: PreTrainedModel, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the prompts' position ids and each prompt's next position.

    Positions are always passed explicitly: implicit ones come from state that an earlier batch left in the model.

    Returns:
        [N, P], or [3, N, P] for multimodal rotary positions; and [N] int64.
    """
    input_ids = inputs["input_ids"]
    num_prompts, length = input_ids.shape
    if hasattr(model.model, "get_rope_index"):
        positions, delta = model.model.get_rope_index(
            input_ids=input_ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
        )
        return positions, delta.view(-1).long() + length
    steps = torch.arange(length, device=input_ids.device)
    return steps.expand(num_prompts, -1), torch.full((num_prompts,), length, device=input_ids.device)


def prefill(model: PreTrainedModel, prompts: Sequence[ModelInputs], num_responses: int) -> Prefix:
    """Run prompts of equal length once and fork their cache to `num_responses` rows each."""
    inputs = {name: tensor.to(model.device) for name, tensor in stack(prompts).items()}
    positions, next_position = prompt_positions(model, inputs)
    cache = DynamicCache(config=model.config.get_text_config())
    output = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(num_responses)
    for layer in cache.layers:
        layer.reorder_cache(cast(torch.LongTensor, rows))
    return Prefix(
        cache=cache,
        logits=output.logits[:, -1].index_select(0, rows),
        next_position=next_position.index_select(0, rows),
        num_position_rows=positions.shape[0] if positions.dim() == 3 else 0,
    )


def response_logits(
    model: PreTrainedModel, prompts: Sequence[ModelInputs], responses: torch.Tensor, *, shared: bool
) -> torch.Tensor:
    """Give the logits that predict each response token, the first one included.

    Args:
        model: any image-text-to-text model.
        prompts: N encoded prompts of equal signature.
        responses: [B, T] int64, B = N * G in the prompts' order, padded on the right with any text token.
        shared: compute each prompt once and continue from its cache; else once per response, in one plain pass.

    Returns:
        [B, T, V] in the model's dtype; row k of a response depends on its tokens before k alone.
    """
    responses = responses.to(model.device)
    num_rows, num_steps = responses.shape
    num_responses = num_rows // len(prompts)
    if not shared:
        return _plain_logits(model, [prompt for prompt in prompts for _ in range(num_responses)], responses)
    prefix = prefill(model, prompts, num_responses)
    first = prefix.logits[:, None]
    if num_steps == 1:
        return first
    rest = model(
        input_ids=responses[:, :-1],
        position_ids=prefix.positions(0, num_steps - 1),
        past_key_values=prefix.cache,
        use_cache=True,
    ).logits
    return torch.cat([first, rest], dim=1)


def _plain_logits(model: PreTrainedModel, prompts: Sequence[ModelInputs], responses: torch.Tensor) -> torch.Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in stack(prompts).items()}
    positions, next_position = prompt_positions(model, inputs)
    num_steps = responses.shape[1]
    steps = next_position[:, None] + torch.arange(num_steps, device=model.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], responses], dim=1)
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(responses, dtype=inputs["mm_token_type_ids"].dtype)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], dim=1)
    logits: torch.Tensor = model(
        **inputs,
        position_ids=torch.cat([positions, steps.expand(*positions.shape[:-1], -1)], dim=-1),
        use_cache=False,
        logits_to_keep=num_steps + 1,
    ).logits
    return logits[:, :-1]


def can_share_prompt(model: PreTrainedModel) -> bool:
    """Tell whether gradients through a shared prompt's cache are right: full attention in all layers."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    return layer_types is None or set(layer_types) == {"full_attention"}
