"""A model's logits at response positions, the prompt computed once for all of its responses.

Prompts of one batch have equal length, so nothing is padded on the left and no attention mask is needed: that holds
for every family, linear attention included. Responses are padded on the right, where causality hides the padding.
Legend: N prompts, G responses each, B = N * G, P prompt tokens, T response tokens, V vocabulary.
"""

import copy
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
        hidden: [B, H]; last hidden state of each prompt, from which each response's first token follows.
        next_position: [B] int64; position of each response's first token.
        num_position_rows: 3 where a position is (time, height, width), else 0.
    """

    cache: DynamicCache
    hidden: torch.Tensor
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


@dataclass(frozen=True)
class Stem:
    """What several prompts begin with, computed once.

    Attributes:
        cache: its keys, values and states, one row per prompt; never written to.
        length: its tokens, at least the first image's.
    """

    cache: DynamicCache
    length: int


def stem_length(prompts: Sequence[ModelInputs]) -> int:
    """Give how many tokens prompts with the same first image have in common at their beginning, that image included.

    Args:
        prompts: encoded prompts; their first images have the same pixels.

    Returns:
        Tokens, fewer than any of the prompts has and none of a second image; 0 where there is one prompt alone, or
        where images cannot be told apart in the inputs.
    """
    if len(prompts) == 1 or any("image_grid_thw" not in prompt for prompt in prompts):
        return 0
    rows = [prompt["input_ids"][0].tolist() for prompt in prompts]
    length = next(
        (place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows))
    )
    first_image_end = 0
    for prompt, row in zip(prompts, rows, strict=True):
        visual = prompt["mm_token_type_ids"][0].bool().tolist()
        first_image_end = visual.index(False, visual.index(True))
        second = visual.index(True, first_image_end) if True in visual[first_image_end:] else len(row)
        # The last token of a prompt is computed with the rest of it: the first response token follows from it.
        length = min(length, second, len(row) - 1)
    return length if length >= first_image_end else 0


def compute_stem(model: PreTrainedModel, prompts: Sequence[ModelInputs], length: int) -> Stem:
    """Run the first tokens of prompts of equal length, with the one image among them."""
    positions, _ = prompt_positions(model, _on(model, stack(prompts)))
    inputs = _on(model, stack([_cut(prompt, 0, length, slice(0, 1)) for prompt in prompts]))
    cache = DynamicCache(config=model.config.get_text_config())
    model.model(**inputs, position_ids=positions[..., :length], past_key_values=cache, use_cache=True)
    return Stem(cache, length)


def prefill(
    model: PreTrainedModel, prompts: Sequence[ModelInputs], num_responses: int, stem: Stem | None = None
) -> Prefix:
    """Run prompts of equal length once and fork their cache to `num_responses` rows each.

    Args:
        model: any image-text-to-text model.
        prompts: N encoded prompts of equal signature.
        num_responses: G.
        stem: what was computed of them already.
    """
    inputs = _on(model, stack(prompts))
    positions, next_position = prompt_positions(model, inputs)
    if stem is None:
        cache = DynamicCache(config=model.config.get_text_config())
    else:
        cache = _fork(stem.cache, torch.arange(len(prompts), device=model.device))
        inputs = _on(model, stack([_cut(prompt, stem.length, None, slice(1, None)) for prompt in prompts]))
        positions = positions[..., stem.length :]
    output = model.model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(num_responses)
    return Prefix(
        cache=_fork(cache, rows),
        hidden=output.last_hidden_state[:, -1].index_select(0, rows),
        next_position=next_position.index_select(0, rows),
        num_position_rows=positions.shape[0] if positions.dim() == 3 else 0,
    )


def response_hidden(model: PreTrainedModel, prefix: Prefix, responses: torch.Tensor) -> torch.Tensor:
    """Give the last hidden states that each response token follows from, the first one included.

    Args:
        model: as `prefill` had it.
        prefix: B rows; used up.
        responses: [B, T] int64, padded on the right with any text token.

    Returns:
        [B, T, H]; only these rows need to meet the output layer.
    """
    first, num_steps = prefix.hidden[:, None], responses.shape[1]
    if num_steps == 1:
        return first
    rest = model.model(
        input_ids=responses[:, :-1].to(model.device),
        position_ids=prefix.positions(0, num_steps - 1),
        past_key_values=prefix.cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], dim=1)


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Give the logits of last hidden states; [..., V] in the model's dtype."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits


def _on(model: PreTrainedModel, inputs: ModelInputs) -> ModelInputs:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _fork(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """Copy rows of a cache to a new one; rows may repeat, and the old cache stays as it is."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in forked.layers:
        # Linear attention keeps its states in dictionaries, which the two copies must not share.
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
        layer.reorder_cache(cast(torch.LongTensor, rows))
    return forked


def _cut(inputs: ModelInputs, start: int, end: int | None, images: slice) -> ModelInputs:
    """Give some tokens of a prompt, and some of its images; no image where none is left."""
    cut = {name: inputs[name][:, start:end] for name in ("input_ids", "mm_token_type_ids")}
    grid = inputs["image_grid_thw"]
    if len(grid[images]):
        pixels = inputs["pixel_values"].split(grid.prod(-1).tolist())
        cut |= {"image_grid_thw": grid[images], "pixel_values": torch.cat(pixels[images])}
    return cut


def response_logits(model: PreTrainedModel, prompts: Sequence[ModelInputs], responses: torch.Tensor) -> torch.Tensor:
    """Give the logits that predict each response token, the first one included, by one plain pass over all tokens.

    Args:
        model: any image-text-to-text model.
        prompts: B encoded prompts of equal signature, one per response.
        responses: [B, T] int64, padded on the right with any text token.

    Returns:
        [B, T, V] in the model's dtype; row k of a response depends on its tokens before k alone.
    """
    responses = responses.to(model.device)
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
