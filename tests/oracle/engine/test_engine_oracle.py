"""The engine in the box against plain forward passes and exact distributions."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from support.plain import PROMPT, allowed_ids, plain_logits, plain_logprobs, prompts, with_top_k, words
from support.tiny_models import FAMILIES, picture

from tasks.adapters.models import load_model
from tasks.adapters.prompts import num_tokens
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.ports import Prompt, ReplayRequest, ResponseScores, SamplingRequest

WIDE = 100_000
# Qwen3.5's linear attention computes in float32 whatever the model's type.
EXACT = {"qwen3_vl": 1e-10, "qwen2_5_vl": 1e-10, "qwen3_5": 5e-5, "idefics3": 1e-10}
FLOAT32 = {"qwen3_vl": 1e-5, "qwen2_5_vl": 1e-5, "qwen3_5": 5e-5, "idefics3": 1e-5}
TOP_K = 5


def nothing(_: int) -> None:
    pass


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Callable[..., TransformersEngine]:
    def make(family: str, *, dtype: str = "float32", max_batch_tokens: int = WIDE) -> TransformersEngine:
        return TransformersEngine(
            folders[family], "initial", dtype=dtype, device="cpu", max_batch_tokens=max_batch_tokens
        )

    return make


def mixed_prompts(engine: TransformersEngine) -> list[Prompt]:
    """Prompts with one and two pictures of several sizes, in an order that mixes what can be stacked."""
    one, two = prompts(engine.processor, [(24, 16)], 3), prompts(engine.processor, [(16, 16), (32, 24)], 2)
    tall = prompts(engine.processor, [(16, 32)], 1)
    return [one[0], two[0], tall[0], one[1], two[1], one[2]]


def replay_requests(engine: TransformersEngine) -> list[ReplayRequest]:
    """Groups of three and of one, of all lengths from 1."""
    requests = []
    for number, prompt in enumerate(mixed_prompts(engine)):
        lengths = [1 + (number + 3 * index) % 5 for index in range(1 if number == 3 else 3)]
        responses = [words(engine.processor, length, 10 * number + index) for index, length in enumerate(lengths)]
        requests.append(ReplayRequest(prompt, tuple(responses)))
    return requests


def sampling_requests(engine: TransformersEngine) -> list[SamplingRequest]:
    return [
        SamplingRequest(prompt, tuple(range(100 * number, 100 * number + (2 if number == 1 else 4))))
        for number, prompt in enumerate(mixed_prompts(engine))
    ]


def flat(scores: Sequence[Sequence[ResponseScores]]) -> torch.Tensor:
    return torch.cat([score.logprobs for group in scores for score in group])


# --- replay -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_plain_pass(
    family: str, engine: Callable[..., TransformersEngine], folders: dict[str, Path]
) -> None:
    ours = engine(family, dtype="float64")
    plain = load_model(folders[family], "float64", "cpu")
    requests = replay_requests(ours)
    for request, group in zip(requests, ours.score(with_top_k(requests, TOP_K), advance=nothing), strict=True):
        inputs = ours.processor.encode(request.prompt)
        for response, score in zip(request.responses, group, strict=True):
            logprobs = plain_logits(plain, inputs, response).log_softmax(-1)
            top = torch.topk(logprobs, TOP_K, dim=-1)
            own = logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]
            assert score.logprobs.shape == (len(response),)
            assert (score.logprobs - own).abs().max() <= EXACT[family]
            assert torch.equal(score.topk_ids, top.indices)
            assert (score.topk_logprobs - top.values).abs().max() <= EXACT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_budget_or_company(family: str, engine: Callable[..., TransformersEngine]) -> None:
    wide = engine(family)
    requests = replay_requests(wide)
    expected = wide.score(with_top_k(requests, TOP_K), advance=nothing)
    narrow = engine(family, max_batch_tokens=1).score(with_top_k(requests, TOP_K), advance=nothing)
    backwards = wide.score(with_top_k(requests[::-1], TOP_K), advance=nothing)[::-1]
    alone = [wide.score(with_top_k([request], TOP_K), advance=nothing)[0] for request in requests]
    for other in (narrow, backwards, alone):
        assert (flat(other) - flat(expected)).abs().max() <= FLOAT32[family]
        for ours, theirs in zip(chain(*expected), chain(*other), strict=True):
            assert torch.equal(ours.topk_ids, theirs.topk_ids)


def test_no_top_k_is_stored_where_none_is_asked_for(engine: Callable[..., TransformersEngine]) -> None:
    ours = engine("qwen3_vl")
    requests = replay_requests(ours)[:2]
    finished: list[int] = []
    scores = chain(*ours.score(requests, advance=finished.append))
    assert sum(finished) == len(requests)
    for score in scores:
        assert score.topk_ids.shape == score.topk_logprobs.shape == (len(score.logprobs), 0)


def test_a_prompt_is_computed_once_for_all_its_responses(engine: Callable[..., TransformersEngine]) -> None:
    ours = engine("qwen3_vl")
    requests = replay_requests(ours)
    for request, group in zip(requests, ours.score(requests, advance=nothing), strict=True):
        prompt = num_tokens(ours.processor.encode(request.prompt))
        lengths = [len(response) for response in request.responses]
        assert [score.num_tokens for score in group] == [prompt + length for length in lengths]
        assert sum(score.num_computed_tokens for score in group) == prompt + sum(lengths)


def view_requests(engine: TransformersEngine, crops: Sequence[tuple[int, int] | None]) -> list[ReplayRequest]:
    """Three samples, each under several views: the same picture and words, with a crop of its own or without."""
    requests = []
    for number in range(3):
        full = picture(24, 16, seed=number)
        responses = tuple(
            words(engine.processor, 1 + (number + 2 * index) % 5, 10 * number + index) for index in range(4)
        )
        for position, size in enumerate(crops):
            extra = [picture(*size, seed=100 + 10 * number + position)] if size is not None else []
            prompt = engine.processor.prompt(f"w{number} w9", [full, *extra], PROMPT)
            requests.append(ReplayRequest(prompt, responses, top_k=TOP_K if position == 0 else 0))
    return requests


@torch.no_grad()
@pytest.mark.parametrize(
    "crops",
    [[(16, 16), (16, 16)], [(16, 16), (32, 24)], [(16, 16), (16, 16), None], [None, (16, 16)]],
    ids=["two crops", "crops of two sizes", "with and without", "without, with"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_views_that_share_their_image_score_as_plain_passes(
    family: str,
    crops: list[tuple[int, int] | None],
    engine: Callable[..., TransformersEngine],
    folders: dict[str, Path],
) -> None:
    ours = engine(family, dtype="float64")
    plain = load_model(folders[family], "float64", "cpu")
    requests = view_requests(ours, crops)
    for request, group in zip(requests, ours.score(requests, advance=nothing), strict=True):
        inputs = ours.processor.encode(request.prompt)
        for response, score in zip(request.responses, group, strict=True):
            logprobs = plain_logits(plain, inputs, response).log_softmax(-1)
            own = logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]
            assert (score.logprobs - own).abs().max() <= EXACT[family]
            assert score.topk_ids.shape == (len(response), request.top_k)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_views_compute_their_image_once(family: str, engine: Callable[..., TransformersEngine]) -> None:
    ours = engine(family)
    requests = view_requests(ours, [(16, 16), (16, 16), None])
    scores = ours.score(requests, advance=nothing)
    for start in range(0, len(requests), 3):
        prompts = [ours.processor.encode(request.prompt) for request in requests[start : start + 3]]
        lengths = [sum(map(len, request.responses)) for request in requests[start : start + 3]]
        computed = [sum(score.num_computed_tokens for score in group) for group in scores[start : start + 3]]
        # What all three begin with, up to the end of the full image, is computed for the first of them.
        visual = prompts[0]["mm_token_type_ids"][0].tolist()
        stem = len(visual) - num_tokens(prompts[0]) + visual.index(0, visual.index(1)) + 1
        for number, (prompt, length, count) in enumerate(zip(prompts, lengths, computed, strict=True)):
            assert count == num_tokens(prompt) + length - (stem if number else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_do_not_depend_on_budget_or_company(family: str, engine: Callable[..., TransformersEngine]) -> None:
    wide = engine(family)
    requests = view_requests(wide, [(16, 16), (32, 24)])
    expected = wide.score(requests, advance=nothing)
    done: list[int] = []
    narrow = engine(family, max_batch_tokens=1).score(requests, advance=done.append)
    alone = [wide.score([request], advance=nothing)[0] for request in requests]
    backwards = wide.score(requests[::-1], advance=nothing)[::-1]
    assert sum(done) == len(requests)
    for other in (narrow, alone, backwards):
        assert (flat(other) - flat(expected)).abs().max() <= FLOAT32[family]


def test_pictures_that_only_look_alike_are_not_shared(engine: Callable[..., TransformersEngine]) -> None:
    """Of two samples with the same words, each sees its own picture."""
    ours = engine("qwen3_vl")
    response = (words(ours.processor, 4, 0),)
    requests = [
        ReplayRequest(ours.processor.prompt("w1", [picture(24, 16, seed=seed)], PROMPT), response) for seed in (1, 2)
    ]
    first, second = ours.score(requests, advance=nothing)
    assert (first[0].logprobs - second[0].logprobs).abs().max() > 0.01


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_do_not_depend_on_budget_or_company(family: str, engine: Callable[..., TransformersEngine]) -> None:
    wide = engine(family)
    requests = sampling_requests(wide)
    finished: list[int] = []

    def sample(
        ours: TransformersEngine, asked: Sequence[SamplingRequest]
    ) -> list[list[tuple[tuple[int, ...], bool, str]]]:
        groups = ours.sample(asked, temperature=1.0, max_new_tokens=6, advance=finished.append)
        return [[(response.token_ids, response.truncated, response.text) for response in group] for group in groups]

    expected = sample(wide, requests)
    assert sum(finished) == len(requests)
    assert [len(group) for group in expected] == [len(request.seeds) for request in requests]
    assert len({tokens for group in expected for tokens, *_ in group}) > 15
    assert sample(wide, requests) == expected
    assert sample(engine(family, max_batch_tokens=1), requests) == expected
    assert sample(wide, requests[::-1])[::-1] == expected
    alone = [[sample(wide, [SamplingRequest(r.prompt, (seed,))])[0][0] for seed in r.seeds] for r in requests]
    assert alone == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_responses_begin_like_shorter_ones(family: str, engine: Callable[..., TransformersEngine]) -> None:
    ours = engine(family)
    requests = sampling_requests(ours)
    short, long = (ours.sample(requests, temperature=1.0, max_new_tokens=length, advance=nothing) for length in (3, 6))
    for left, right in zip(chain(*short), chain(*long), strict=True):
        assert right.token_ids[:3] == left.token_ids


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logprobs_are_those_of_replay(
    family: str, temperature: float, engine: Callable[..., TransformersEngine]
) -> None:
    ours = engine(family)
    requests = sampling_requests(ours)
    groups = ours.sample(requests, temperature=temperature, max_new_tokens=6, advance=nothing)
    replays = [
        ReplayRequest(request.prompt, tuple(response.token_ids for response in group))
        for request, group in zip(requests, groups, strict=True)
    ]
    recorded = torch.tensor([value for group in groups for response in group for value in response.logprobs])
    assert (flat(ours.score(replays, advance=nothing)) - recorded).abs().max() <= FLOAT32[family]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_is_a_plain_greedy_loop(
    family: str, engine: Callable[..., TransformersEngine], folders: dict[str, Path]
) -> None:
    ours = engine(family, dtype="float64")
    plain = load_model(folders[family], "float64", "cpu")
    requests = [SamplingRequest(prompt, (0, 1)) for prompt in mixed_prompts(ours)]
    ends = set(plain.generation_config.eos_token_id)
    allowed = allowed_ids(folders[family])
    for request, group in zip(
        requests, ours.sample(requests, temperature=0, max_new_tokens=6, advance=nothing), strict=True
    ):
        inputs = ours.processor.encode(request.prompt)
        tokens: list[int] = []
        while len(tokens) < 6 and not ends & {*tokens}:
            logits = plain_logits(plain, inputs, [*tokens, 0])[-1]
            tokens.append(int(allowed[logits[allowed].argmax()]))
        assert group[0].token_ids == group[1].token_ids == tuple(tokens)
        assert torch.tensor(group[0].logprobs).sub(plain_logprobs(plain, inputs, tokens)).abs().max() <= 1e-5
        assert group[0].truncated == (not ends & {*tokens})


@torch.no_grad()
def expected_distribution(
    ours: TransformersEngine, folder: Path, prompt: Prompt, before: Sequence[int], temperature: float
) -> torch.Tensor:
    """What the next token is drawn from: the model's distribution at a temperature, over the tokens that may be."""
    plain = load_model(folder, "float64", "cpu")
    logits = plain_logits(plain, ours.processor.encode(prompt), [*before, 0])[-1] / temperature
    allowed = allowed_ids(folder)
    return torch.zeros_like(logits).index_copy(0, allowed, logits[allowed].softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(
    temperature: float, engine: Callable[..., TransformersEngine], folders: dict[str, Path]
) -> None:
    """Pearson's chi-square, first token and second token, over 6,000 seeds: below the 99.9% point of the right one."""
    num_seeds = 6_000
    ours = engine("qwen3_vl")
    (prompt,) = prompts(ours.processor, [(16, 16)], 1)
    request = SamplingRequest(prompt, tuple(range(num_seeds)))
    (group,) = ours.sample([request], temperature=temperature, max_new_tokens=2, advance=nothing)
    first = [response.token_ids[0] for response in group]
    commonest = max(
        (token for token in set(first) if any(r.token_ids[0] == token and len(r.token_ids) > 1 for r in group)),
        key=first.count,
    )
    second = [response.token_ids[1] for response in group if response.token_ids[0] == commonest]
    assert len(second) > num_seeds / 20
    for tokens, before in ((first, []), (second, [commonest])):
        expected = expected_distribution(ours, folders["qwen3_vl"], prompt, before, temperature).numpy() * len(tokens)
        observed = np.bincount(tokens, minlength=len(expected))
        assert observed[expected == 0].sum() == 0
        # Rare tokens as one, so that each class is expected at least five times.
        common = expected >= 5
        differences = np.append(
            (observed[common] - expected[common]) ** 2 / expected[common],
            (observed[~common].sum() - expected[~common].sum()) ** 2 / max(expected[~common].sum(), 1e-9),
        )
        freedom = len(differences) - 1
        assert freedom >= 5
        # Wilson and Hilferty's approximation of the 99.9% point.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
        assert differences.sum() < limit


def test_a_token_is_the_inverse_of_the_cumulative_distribution(
    engine: Callable[..., TransformersEngine], folders: dict[str, Path]
) -> None:
    """Which token a seed gives is fixed: otherwise the same key would name other rollouts."""
    ours = engine("qwen3_vl", dtype="float64")
    (prompt,) = prompts(ours.processor, [(16, 16)], 1)
    (group,) = ours.sample(
        [SamplingRequest(prompt, tuple(range(300)))], temperature=1.0, max_new_tokens=1, advance=nothing
    )
    cumulative = expected_distribution(ours, folders["qwen3_vl"], prompt, [], 1.0).cumsum(-1).numpy()
    uniform = [np.random.Generator(np.random.Philox(seed)).random() for seed in range(300)]
    expected = np.searchsorted(cumulative, np.array(uniform) * cumulative[-1], side="right")
    assert [response.token_ids[0] for response in group] == expected.tolist()
