"""Logits and gradients with a shared prompt against one plain forward pass per response."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain import PROMPT, plain_logits, prompts, words
from support.tiny_models import FAMILIES, picture
from transformers import PreTrainedModel

from tasks.adapters.forward import logits_of, prefill, response_hidden, response_logits
from tasks.adapters.models import load_model
from tasks.adapters.prompts import ModelInputs, PromptProcessor, signature
from tasks.adapters.transformers_engine import pad_right

ONE_IMAGE, TWO_IMAGES = [(24, 16)], [(16, 16), (32, 24)]
LENGTHS = (1, 4, 7, 2, 1, 5)
NUM_PROMPTS = 3
EXACT = 1e-10
FLOAT32 = 1e-5
# Its linear attention decomposes a sequence into chunks: with a cache the chunks, and so the rounding, are others.
FLOAT32_QWEN3_5 = 5e-5

Case = tuple[PreTrainedModel, list[ModelInputs], list[tuple[int, ...]]]


@pytest.fixture
def case(folders: dict[str, Path]) -> Callable[..., Case]:
    """Three stacked prompts with two responses each."""

    def make(family: str, dtype: str, sizes: Sequence[tuple[int, int]] = TWO_IMAGES) -> Case:
        processor = PromptProcessor(folders[family])
        inputs = [processor.encode(prompt) for prompt in prompts(processor, sizes, NUM_PROMPTS)]
        assert len({signature(item) for item in inputs}) == 1
        responses = [words(processor, length, seed) for seed, length in enumerate(LENGTHS)]
        return load_model(folders[family], dtype, "cpu"), inputs, responses

    return make


def our_logits(
    model: PreTrainedModel, inputs: Sequence[ModelInputs], responses: torch.Tensor, *, shared: bool
) -> torch.Tensor:
    """Logits of responses, equally many a prompt: continued from the prompt's cache, or by plain passes."""
    per_prompt = len(responses) // len(inputs)
    if shared:
        return logits_of(model, response_hidden(model, prefill(model, inputs, per_prompt), responses))
    return response_logits(model, [item for item in inputs for _ in range(per_prompt)], responses)


def error(logits: torch.Tensor, model: PreTrainedModel, inputs: Sequence[ModelInputs], responses: Any) -> float:
    """Largest difference of any log-prob of any token from a plain pass."""
    per_prompt = len(responses) // len(inputs)
    differences = []
    for row, tokens in enumerate(responses):
        plain = plain_logits(model, inputs[row // per_prompt], tokens).log_softmax(-1)
        differences.append((logits[row, : len(tokens)].log_softmax(-1) - plain).abs().max().item())
    return max(differences)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sizes", [ONE_IMAGE, TWO_IMAGES], ids=["one image", "two images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_plain_pass(
    family: str, sizes: list[tuple[int, int]], shared: bool, case: Callable[..., Case], float64_throughout: None
) -> None:
    model, inputs, responses = case(family, "float64", sizes)
    logits = our_logits(model, inputs, pad_right(responses, 0), shared=shared)
    assert logits.shape[:2] == (len(responses), max(LENGTHS))
    assert error(logits, model, inputs, responses) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_plain_pass_in_float32(family: str, shared: bool, case: Callable[..., Case]) -> None:
    model, inputs, responses = case(family, "float32")
    logits = our_logits(model, inputs, pad_right(responses, 0), shared=shared)
    limit = FLOAT32_QWEN3_5 if family == "qwen3_5" else FLOAT32
    assert error(logits, model, inputs, responses) <= limit


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_predicted_by_the_prompt_alone(
    family: str, shared: bool, case: Callable[..., Case], float64_throughout: None
) -> None:
    """The log-prob that is lost where responses are scored off by one."""
    model, inputs, responses = case(family, "float64")
    logits = our_logits(model, inputs, pad_right(responses, 0), shared=shared)
    for row in range(len(responses)):
        prompt = inputs[row // 2]
        alone = model(**prompt, attention_mask=torch.ones_like(prompt["input_ids"])).logits[0, -1]
        assert (logits[row, 0] - alone).abs().max() <= EXACT
        assert (logits[row, 0] - logits[row, 1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_responses_of_one_token(family: str, shared: bool, case: Callable[..., Case], float64_throughout: None) -> None:
    model, inputs, responses = case(family, "float64")
    single = [tokens[:1] for tokens in responses]
    logits = our_logits(model, inputs, pad_right(single, 0), shared=shared)
    assert logits.shape[1] == 1
    assert error(logits, model, inputs, single) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_prompts_with_different_numbers_of_images_stack_where_lengths_agree(
    family: str, shared: bool, folders: dict[str, Path]
) -> None:
    processor = PromptProcessor(folders[family])
    # 12 visual tokens, or 4 + 6 and one more pair of delimiters.
    pictures = [[picture(24, 32, 0)], [picture(16, 16, 1), picture(24, 16, 2)]]
    inputs = [processor.encode(processor.prompt("w1", images, PROMPT)) for images in pictures]
    assert signature(inputs[0]) == signature(inputs[1])
    model = load_model(folders[family], "float64", "cpu")
    responses = [words(processor, 3, seed) for seed in range(4)]
    logits = our_logits(model, inputs, pad_right(responses, 0), shared=shared)
    assert error(logits, model, inputs, responses) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_plain_passes(
    family: str, case: Callable[..., Case], float64_throughout: None
) -> None:
    """Of all parameters, the vision tower's included, by the path that the trainer takes without packed rows."""
    model, inputs, responses = case(family, "float64")
    factors = torch.randn(len(responses), max(LENGTHS), generator=torch.Generator().manual_seed(0)).double()

    def gradients(logprobs: Callable[[int], torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        terms = [
            (factors[row, : len(tokens)] * logprobs(row).gather(-1, torch.tensor(tokens)[:, None])[:, 0]).sum()
            for row, tokens in enumerate(responses)
        ]
        torch.stack(terms).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    logits = our_logits(model, inputs, pad_right(responses, 0), shared=False)
    found = gradients(lambda row: logits[row, : len(responses[row])].log_softmax(-1))
    plain = gradients(lambda row: plain_logits(model, inputs[row // 2], responses[row]).log_softmax(-1))

    assert set(found) == set(plain) == {name for name, _ in model.named_parameters()}
    assert any("vis" in name for name in found)
    for name, gradient in plain.items():
        if gradient.norm() > EXACT:
            assert (found[name] - gradient).norm() <= EXACT * gradient.norm(), name
        else:
            # Softmax does not see a bias on all keys: without rotary positions its gradient is zero but for rounding.
            assert name.endswith("k_proj.bias")
            assert found[name].norm() <= EXACT
