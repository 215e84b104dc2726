"""What the engine and the trainer are compared with: one response at a time, one whole forward pass, no cache."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from support.tiny_models import picture
from torch import Tensor
from transformers import PreTrainedModel

from tasks.adapters.prompts import ModelInputs, PromptProcessor
from tasks.config import PromptConfig
from tasks.ports import Prompt, ReplayRequest

PROMPT = PromptConfig(system="w3", template="{question} w4")


def plain_logits(model: PreTrainedModel, inputs: ModelInputs, response: Sequence[int]) -> Tensor:
    """Give the logits that predict each token of one response, [T, V]; the model finds its positions by itself."""
    tokens = torch.tensor([list(response)], dtype=torch.int64)
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    if "mm_token_type_ids" in others:
        types = others["mm_token_type_ids"]
        others["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(tokens, dtype=types.dtype)], dim=1)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **others)
    first = inputs["input_ids"].shape[1] - 1
    logits: Tensor = output.logits[0, first : first + len(response)]
    return logits


def plain_logprobs(model: PreTrainedModel, inputs: ModelInputs, response: Sequence[int]) -> Tensor:
    """Give the log-prob of each token of one response, [T]."""
    logprobs = plain_logits(model, inputs, response).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def prompts(processor: PromptProcessor, sizes: Sequence[tuple[int, int]], count: int) -> list[Prompt]:
    """Give prompts of equal length that differ in their pictures and in their words."""
    return [
        processor.prompt(
            f"w{number} w{number + 1}",
            [picture(*size, seed=10 * number + position) for position, size in enumerate(sizes)],
            PROMPT,
        )
        for number in range(count)
    ]


def with_top_k(requests: Sequence[ReplayRequest], top_k: int) -> list[ReplayRequest]:
    """Ask for the likeliest tokens too."""
    return [replace(request, top_k=top_k) for request in requests]


def words(processor: PromptProcessor, count: int, seed: int) -> tuple[int, ...]:
    """Give a response of ordinary tokens: the letter w, and its companions or numbers."""
    ordinary = processor.tokenizer(" ".join(f"w{number}" for number in range(10, 20)))["input_ids"]
    drawn = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(ordinary[index] for index in drawn.tolist())


def allowed_ids(folder: Path) -> Tensor:
    """Give what may stand in a response, read from the folder's files: end-of-turn, and tokens that are not special."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    special = {token["id"] for token in tokens["added_tokens"] if token["special"]}
    return torch.tensor(sorted({*tokens["model"]["vocab"].values()} - special | {*ends}))
