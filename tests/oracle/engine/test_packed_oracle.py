"""Packed rows against one plain forward and backward pass per response."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.plain import plain_logits, plain_logprobs, prompts, words
from support.tiny_models import FAMILIES
from torch import Tensor
from transformers import PreTrainedModel

from tasks.adapters import packed
from tasks.adapters.models import load_model
from tasks.adapters.output_layer import score_tokens
from tasks.adapters.packed import enable_packing, packed_hidden
from tasks.adapters.policy_model import PolicyModel
from tasks.adapters.prompts import ModelInputs, PromptProcessor
from tasks.adapters.transformers_engine import pad_right

QWEN = ("qwen3_vl", "qwen2_5_vl", "qwen3_5")
ONE_IMAGE, TWO_IMAGES = [(24, 16)], [(16, 16), (32, 24)]
EXACT = 1e-10
FLOAT32 = 1e-5
# Its linear attention decomposes a sequence into chunks: after a prompt the chunks, and so the rounding, are others.
FLOAT32_QWEN3_5 = 5e-5
GROUPS: dict[str, tuple[Sequence[int], int]] = {
    "ragged": ((1, 4, 7, 2, 1, 5), 3),
    "one response": ((4, 3), 1),
    "one token": ((1, 1, 1, 1), 2),
    "two tokens": ((2, 1, 2, 2), 2),
    # Linear attention goes in chunks of 64.
    "long": ((3, 70), 2),
}
CHECKPOINTING = {"none": None, "reentrant": True, "not reentrant": False}

Case = tuple[PreTrainedModel, list[ModelInputs], list[tuple[int, ...]], list[Tensor]]


@pytest.fixture
def case(folders: dict[str, Path]) -> Callable[..., Case]:
    """Prompts of equal length with responses each, and a factor for each token's log-prob."""

    def make(family: str, dtype: str, group: str = "ragged", sizes: Sequence[tuple[int, int]] = TWO_IMAGES) -> Case:
        lengths, num_responses = GROUPS[group]
        processor = PromptProcessor(folders[family])
        inputs = [processor.encode(prompt) for prompt in prompts(processor, sizes, len(lengths) // num_responses)]
        for item, token in zip(inputs, words(processor, len(inputs), seed=9), strict=True):
            # They would all end alike, and so would the states of short convolutions.
            item["input_ids"][0, -1] = token
        responses = [words(processor, length, seed) for seed, length in enumerate(lengths)]
        random = torch.Generator().manual_seed(0)
        factors = [torch.randn(length, generator=random, dtype=torch.float64) for length in lengths]
        return load_model(folders[family], dtype, "cpu"), inputs, responses, factors

    return make


def packed_logprobs(
    model: PreTrainedModel, inputs: Sequence[ModelInputs], responses: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Each response's log-probs, by packed rows and the output layer."""
    tokens = pad_right(responses, 0)
    hidden = packed_hidden(model, inputs, tokens)
    weight = model.get_output_embeddings().weight
    logprobs = score_tokens(hidden.flatten(0, 1), weight, tokens.flatten()).logprobs.view(tokens.shape)
    return [row[: len(response)] for row, response in zip(logprobs, responses, strict=True)]


def loss(logprobs: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    return torch.stack([(row * factor).sum() for row, factor in zip(logprobs, factors, strict=True)]).sum()


def gradients(model: PreTrainedModel, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_gradients(
    model: PreTrainedModel,
    inputs: Sequence[ModelInputs],
    responses: Sequence[Sequence[int]],
    factors: Sequence[Tensor],
) -> dict[str, Tensor]:
    per_prompt = len(responses) // len(inputs)
    rows = [plain_logprobs(model, inputs[row // per_prompt], tokens) for row, tokens in enumerate(responses)]
    return gradients(model, loss(rows, factors))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, as a share of the second's norm."""
    assert set(found) == set(expected)
    difference = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    return (difference / torch.stack([gradient.norm() for gradient in expected.values()]).norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("family", QWEN)
def test_logprobs_equal_a_plain_pass(
    family: str, group: str, dtype: str, case: Callable[..., Case], request: pytest.FixtureRequest
) -> None:
    if dtype == "float64":
        request.getfixturevalue("float64_throughout")
    limit = EXACT if dtype == "float64" else FLOAT32_QWEN3_5 if family == "qwen3_5" else FLOAT32
    model, inputs, responses, _ = case(family, dtype, group)
    per_prompt = len(responses) // len(inputs)
    expected = [plain_logprobs(model, inputs[row // per_prompt], tokens) for row, tokens in enumerate(responses)]
    enable_packing(model)
    for found, plain in zip(packed_logprobs(model, inputs, responses), expected, strict=True):
        assert (found - plain).abs().max() <= limit


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("family", QWEN)
def test_gradients_equal_those_of_plain_passes(
    family: str, group: str, checkpointing: str, case: Callable[..., Case], float64_throughout: None
) -> None:
    """Of all parameters, the vision tower's included."""
    model, inputs, responses, factors = case(family, "float64", group)
    expected = plain_gradients(model, inputs, responses, factors)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    enable_packing(model)
    if (reentrant := CHECKPOINTING[checkpointing]) is not None:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.get_decoder().layers[0].mlp.register_forward_pre_hook(count)
    found = gradients(model, loss(packed_logprobs(model, inputs, responses), factors))
    assert passes == (1 if reentrant is None else 2)
    assert distance(found, expected) <= EXACT
    vision = {name: gradient for name, gradient in expected.items() if ".visual." in name}
    assert distance({name: found[name] for name in vision}, vision) <= EXACT


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_query_heads_share_key_heads(family: str, case: Callable[..., Case], float64_throughout: None) -> None:
    """Four heads of queries on two of keys; elsewhere here all queries share one."""
    model, inputs, responses, _ = case(family, "float64")
    config = copy.deepcopy(model.config)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    model = type(model)(config).double()
    expected = [plain_logprobs(model, inputs[row // 3], tokens) for row, tokens in enumerate(responses)]
    enable_packing(model)
    for found, plain in zip(packed_logprobs(model, inputs, responses), expected, strict=True):
        assert (found - plain).abs().max() <= EXACT


@pytest.mark.parametrize("group", ["ragged", "long"])
@pytest.mark.parametrize("family", QWEN)
def test_gradients_in_float32(family: str, group: str, case: Callable[..., Case]) -> None:
    model, inputs, responses, factors = case(family, "float32", group)
    expected = plain_gradients(model, inputs, responses, factors)
    enable_packing(model)
    found = gradients(model, loss(packed_logprobs(model, inputs, responses), factors))
    assert distance(found, expected) <= FLOAT32


@pytest.mark.parametrize("family", QWEN)
def test_sub_groups_add_up_to_the_group(family: str, case: Callable[..., Case], float64_throughout: None) -> None:
    model, inputs, responses, factors = case(family, "float64")
    per_prompt = len(responses) // len(inputs)
    enable_packing(model)
    expected = gradients(model, loss(packed_logprobs(model, inputs, responses), factors))
    parts = []
    for row, prompt in enumerate(inputs):
        for start, end in ((0, 2), (2, 3)):
            rows = slice(per_prompt * row + start, per_prompt * row + end)
            parts.append(loss(packed_logprobs(model, [prompt], responses[rows]), factors[rows]))
    assert distance(gradients(model, torch.stack(parts).sum()), expected) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_takes_packed_rows_computes_all_else_as_before(family: str, case: Callable[..., Case]) -> None:
    model, inputs, responses, _ = case(family, "float32", sizes=ONE_IMAGE)
    ids = torch.cat([inputs[0]["input_ids"], inputs[0]["input_ids"]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    text = {"input_ids": ids.clamp(max=3), "attention_mask": mask}
    before = plain_logits(model, inputs[0], responses[1]), model(**text).logits
    written = model.config.to_json_string()
    enable_packing(model)
    packed_logprobs(model, inputs, responses)
    assert torch.equal(plain_logits(model, inputs[0], responses[1]), before[0])
    assert torch.equal(model(**text).logits, before[1])
    assert model.config.to_json_string() == written


@pytest.mark.parametrize("family", FAMILIES)
def test_families_share_exactly(family: str, case: Callable[..., Case]) -> None:
    model, inputs, responses, _ = case(family, "float32")
    policy = PolicyModel(model)
    assert policy.try_packing(policy, inputs[0], pad_right(responses[1:3], 0))
    assert policy.packed


@pytest.mark.parametrize("part", ["attention", "linear attention", "position", "output layer", "window", "eager"])
def test_a_path_that_differs_is_refused(part: str, case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, responses, _ = case("qwen3_5", "float32")
    if part == "attention":
        # Takes the layout and does not heed it.
        plain = packed.sdpa_attention_forward
        monkeypatch.setattr(packed, "_attention", lambda *args, packing=None, **kwargs: plain(*args, **kwargs))
    elif part == "linear attention":
        monkeypatch.setattr(packed, "_linear_attention", lambda forward, packing=None, **kwargs: forward(**kwargs))
    elif part == "position":
        right = packed.prompt_positions
        monkeypatch.setattr(packed, "prompt_positions", lambda *args: (right(*args)[0], right(*args)[1] + 1))
    elif part == "output layer":
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, logits: 3 * torch.tanh(logits / 3))
    elif part == "eager":
        model.set_attn_implementation("eager")
    else:
        model.config.text_config.layer_types = ["linear_attention", "sliding_attention"]
    policy = PolicyModel(model)
    assert not policy.try_packing(policy, inputs[0], pad_right(responses[1:3], 0))
    assert not policy.packed
    assert (model.get_decoder().config._attn_implementation == "eager") == (part == "eager")
