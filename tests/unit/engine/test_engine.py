"""The engine in the box: what may be sampled, how responses end, and how it takes new weights."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.plain import allowed_ids, plain_logits, prompts, words
from support.tiny_models import FAMILIES, save_tiny_model
from transformers import PreTrainedModel

from tasks.adapters import transformers_engine as module
from tasks.adapters.models import load_model
from tasks.adapters.prompts import banned_ids, end_of_turn_ids
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.ports import ReplayRequest, Response, SamplingRequest
from vzero_core.errors import InputError

LOVE = 100.0
"""Added to a logit: more than any difference between two of them."""


def nothing(_: int) -> None:
    pass


def start(folder: Path, digest: str = "initial", *, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(folder, digest, dtype=dtype, device="cpu", max_batch_tokens=100_000)


def sampling_requests(engine: TransformersEngine) -> list[SamplingRequest]:
    return [
        SamplingRequest(prompt, tuple(range(100 * number, 100 * number + 40)))
        for number, prompt in enumerate(prompts(engine.processor, [(16, 16), (24, 16)], 2))
    ]


def sample(
    engine: TransformersEngine, *, temperature: float = 1.0, max_new_tokens: int = 6, **settings: Any
) -> list[Response]:
    groups = engine.sample(
        sampling_requests(engine), temperature=temperature, max_new_tokens=max_new_tokens, advance=nothing, **settings
    )
    return list(chain(*groups))


def bias(engine: TransformersEngine, token_ids: Sequence[int], by: float) -> None:
    """Make the model love or shun tokens, wherever it stands."""

    def add(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(-1, torch.tensor(token_ids), torch.full((*logits.shape[:-1], len(token_ids)), by))

    engine._model.get_output_embeddings().register_forward_hook(add)


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_never_appear(family: str, temperature: float, folders: dict[str, Path]) -> None:
    """Also where the model wants nothing else, and rows of the vocabulary that have no token."""
    engine = start(folders[family])
    allowed = set(allowed_ids(folders[family]).tolist())
    vocabulary = engine._model.config.get_text_config().vocab_size
    unwanted = sorted(set(range(vocabulary)) - allowed)
    image_id = engine._model.config.image_token_id
    assert image_id in unwanted
    assert vocabulary - 1 in unwanted
    bias(engine, [image_id], LOVE)
    bias(engine, unwanted, LOVE / 2)
    sampled = [token for response in sample(engine, temperature=temperature) for token in response.token_ids]
    assert len(sampled) >= 80
    assert set(sampled) <= allowed


def test_end_of_turn_ends_a_response_and_is_part_of_it(folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    ends = json.loads((folders["qwen3_vl"] / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2
    bias(engine, ends, 1.0)
    longest = 3
    responses = sample(engine, max_new_tokens=longest)
    for response in responses:
        assert len(response.logprobs) == len(response.token_ids)
        assert not {*response.token_ids[:-1]} & {*ends}
        assert response.truncated == (response.token_ids[-1] not in ends)
        assert len(response.token_ids) == longest or not response.truncated
        assert not any(token in response.text for token in ("<|im_end|>", "<|endoftext|>"))
        assert response.text.split() == engine.processor.tokenizer.convert_ids_to_tokens(
            [token for token in response.token_ids if token not in ends]
        )
    assert {response.token_ids[-1] for response in responses if not response.truncated} == {*ends}
    found = {(len(response.token_ids), response.truncated) for response in responses}
    assert found == {(1, False), (2, False), (3, False), (3, True)}


def test_a_batch_whose_responses_all_end_stops(folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    (end, *_) = engine._eos_ids
    bias(engine, [end], LOVE)
    steps: list[object] = []
    engine._model.model.register_forward_hook(lambda *_: steps.append(None))
    for response in sample(engine, max_new_tokens=20):
        assert response.token_ids == (end,)
        assert not response.truncated
        assert response.text == ""
    assert len(steps) == 1


def test_end_of_turn_comes_from_the_generation_config_or_the_tokenizer(folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    generation = engine._model.generation_config
    tokenizer = engine.processor.tokenizer
    assert end_of_turn_ids(generation, engine.processor) == tuple(generation.eos_token_id)
    generation.eos_token_id = 7
    assert end_of_turn_ids(generation, engine.processor) == (7,)
    generation.eos_token_id = None
    assert end_of_turn_ids(generation, engine.processor) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-turn"):
        end_of_turn_ids(generation, engine.processor)


def test_a_token_beyond_the_vocabulary_is_not_banned(folders: dict[str, Path]) -> None:
    """A tokenizer may know more tokens than the model has rows."""
    engine = start(folders["qwen3_vl"])
    engine.processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<extra {number}>" for number in range(5)]}
    )
    banned = banned_ids(engine._model.config, engine.processor, engine._eos_ids)
    assert max(banned) < engine._model.config.get_text_config().vocab_size


# --- what changes probabilities -----------------------------------------------------------------------------------


def expected_probabilities(
    logits: dict[int, float],
    before: Sequence[int],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    presence_penalty: float = 0.0,
) -> dict[int, float]:
    """Give the probabilities of the tokens that are left, the plain way; no two logits may be equal."""
    changed = {token: (logit - presence_penalty * (token in before)) / temperature for token, logit in logits.items()}
    ranked = sorted(changed, key=changed.__getitem__, reverse=True)[: top_k or None]
    likeliest = changed[ranked[0]]
    masses = [np.exp(changed[token] - likeliest) for token in ranked]
    reached = np.array(list(accumulate(masses))) / sum(masses)
    # The smallest number of the likeliest tokens that reach the share.
    number = next(count for count, share in enumerate(reached, start=1) if share >= top_p - 1e-12)
    return {token: mass / sum(masses[:number]) for token, mass in zip(ranked[:number], masses, strict=False)}


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.4, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 3, "top_p": 0.7},
    {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 0.5, "presence_penalty": -2.0},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 4, "presence_penalty": 1.5},
    # No bound at all, and the narrowest.
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 1e-9},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS)
def test_tokens_are_drawn_from_the_distribution_that_the_settings_leave(
    settings: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Each token of each response inverts it at its seed's number, in the order of token ids."""
    folder = folders["qwen3_vl"]
    engine = start(folder, dtype="float64")
    plain = load_model(folder, "float64", "cpu")
    allowed = allowed_ids(folder).tolist()

    def logits_after(request: SamplingRequest) -> Callable[[tuple[int, ...]], dict[int, float]]:
        inputs = engine.processor.encode(request.prompt)

        @cache
        def logits(before: tuple[int, ...]) -> dict[int, float]:
            found = plain_logits(plain, inputs, [*before, 0])[-1]
            return {token: float(found[token]) for token in allowed}

        return logits

    (request, _) = sampling_requests(engine)
    length = 10
    (group,) = engine.sample([request], max_new_tokens=length, advance=nothing, **settings)
    logits = logits_after(request)
    num_repeated = 0
    for seed, response in zip(request.seeds, group, strict=True):
        uniform = np.random.Generator(np.random.Philox(seed)).random(length)
        for place, token in enumerate(response.token_ids):
            before = response.token_ids[:place]
            num_repeated += len({*before}) < len(before)
            left = expected_probabilities(logits(before), before, **settings)
            ordered = sorted(left)
            reached = np.cumsum([left[candidate] for candidate in ordered])
            assert token == ordered[int(np.searchsorted(reached, uniform[place] * reached[-1], side="right"))]
    # A token that is there twice is penalised once.
    assert num_repeated > 0


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"top_k": 2}, {"top_p": 0.8, "top_k": 5}])
def test_over_many_seeds_tokens_have_the_shares_that_the_settings_leave(
    settings: dict[str, Any], folders: dict[str, Path]
) -> None:
    """Within 4.5 standard deviations each, and none of those that are left out."""
    folder = folders["qwen3_vl"]
    engine = start(folder, dtype="float64")
    (request, _) = sampling_requests(engine)
    num_seeds = 4_000
    many = SamplingRequest(request.prompt, tuple(range(num_seeds)))
    (group,) = engine.sample([many], temperature=0.7, max_new_tokens=1, advance=nothing, **settings)
    with torch.no_grad():
        found = plain_logits(load_model(folder, "float64", "cpu"), engine.processor.encode(request.prompt), [0])[-1]
    logits = {token: float(found[token]) for token in allowed_ids(folder).tolist()}
    expected = expected_probabilities(logits, (), temperature=0.7, **settings)
    assert 1 < len(expected) < len(logits)
    sampled = [response.token_ids[0] for response in group]
    assert {*sampled} == {*expected}
    for token, share in expected.items():
        assert abs(sampled.count(token) / num_seeds - share) < 4.5 * (share * (1 - share) / num_seeds) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.5, -2.0])
def test_temperature_0_takes_the_likeliest_after_the_penalty(penalty: float, folders: dict[str, Path]) -> None:
    folder = folders["qwen3_vl"]
    engine = start(folder, dtype="float64")
    plain = load_model(folder, "float64", "cpu")
    allowed = allowed_ids(folder)
    requests = [SamplingRequest(request.prompt, (0,)) for request in sampling_requests(engine)]

    def greedy(**settings: Any) -> list[tuple[int, ...]]:
        groups = engine.sample(requests, temperature=0.0, max_new_tokens=8, advance=nothing, **settings)
        return [response.token_ids for (response,) in groups]

    for request, found in zip(requests, greedy(presence_penalty=penalty), strict=True):
        tokens: list[int] = []
        while len(tokens) < 8 and not {*tokens} & {*engine._eos_ids}:
            logits = plain_logits(plain, engine.processor.encode(request.prompt), [*tokens, 0])[-1]
            for token in {*tokens}:
                logits[token] -= penalty
            tokens.append(int(allowed[logits[allowed].argmax()]))
        assert found == tuple(tokens)
    assert greedy(presence_penalty=penalty) != greedy()
    assert greedy(top_p=0.5, top_k=2) == greedy()


def test_settings_leave_the_recorded_log_probs_to_the_model(folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    requests = sampling_requests(engine)
    groups = engine.sample(
        requests, temperature=0.7, max_new_tokens=6, advance=nothing, top_p=0.8, top_k=4, presence_penalty=1.5
    )
    replays = [
        ReplayRequest(request.prompt, tuple(response.token_ids for response in group))
        for request, group in zip(requests, groups, strict=True)
    ]
    for scored, response in zip(chain(*engine.score(replays, advance=nothing)), chain(*groups), strict=True):
        assert torch.allclose(torch.tensor(response.logprobs), scored.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"presence_penalty": -2.0}])
def test_banned_tokens_take_no_place_among_the_likeliest(settings: dict[str, Any], folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    expected = sample(engine, **settings)
    bias(engine, engine._banned.tolist(), LOVE)
    assert [response.token_ids for response in sample(engine, **settings)] == [
        response.token_ids for response in expected
    ]


# --- new weights --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with another model of a family, of equal shape."""
    root = tmp_path_factory.mktemp("others")

    def make(family: str) -> Path:
        folder = root / family
        return folder if folder.is_dir() else save_tiny_model(family, folder, seed=1)

    return make


def scores(engine: TransformersEngine) -> torch.Tensor:
    requests = [
        ReplayRequest(prompt, (words(engine.processor, 5, 0), words(engine.processor, 3, 1)))
        for prompt in prompts(engine.processor, [(24, 16)], 2)
    ]
    return torch.cat([score.logprobs for group in engine.score(requests, advance=nothing) for score in group])


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_are_those_of_a_fresh_engine(
    family: str, folders: dict[str, Path], others: Callable[[str], Path]
) -> None:
    engine = start(folders[family])
    before = scores(engine)
    engine.load_weights(others(family), "other")
    after = scores(engine)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, scores(start(others(family))))
    # Once more each way: from the second exchange on, files may be read otherwise than a model is.
    for expected, folder, digest in ((before, folders[family], "initial"), (after, others(family), "other")):
        engine.load_weights(folder, digest)
        assert torch.equal(scores(engine), expected)


def test_the_digest_that_is_held_is_no_work(folders: dict[str, Path], others: Callable[[str], Path]) -> None:
    engine = start(folders["qwen3_vl"])
    engine.load_weights(Path("no such folder"), "initial")
    engine.load_weights(others("qwen3_vl"), "other")
    engine.load_weights(Path("no such folder"), "other")
    assert torch.equal(scores(engine), scores(start(others("qwen3_vl"))))


NAME = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_built_for_the_first_exchange_alone(
    dtype: str, folders: dict[str, Path], others: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(folder: Path, *args: Any) -> PreTrainedModel:
        built.append(folder)
        return load_model(folder, *args)

    engine = start(folders["qwen3_vl"], dtype=dtype)
    before = engine._model.state_dict()[NAME].clone()
    monkeypatch.setattr(module, "load_model", build)
    for number, folder in enumerate((others("qwen3_vl"), folders["qwen3_vl"]) * 2):
        engine.load_weights(folder, str(number))
    assert built == [others("qwen3_vl")]
    assert torch.equal(engine._model.state_dict()[NAME], before)


def test_files_that_name_tensors_otherwise_are_read_as_a_model_is(
    folders: dict[str, Path], others: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also after files that did not; names as on the hub, from before the language model had a name of its own."""
    weights = load_model(others("qwen2_5_vl"), "float32", "cpu").state_dict()
    on_hub = {"model.language_model.": "model.", "model.visual.": "visual."}
    for kind, names in (("plain", {}), ("hub", on_hub)):
        folder = shutil.copytree(others("qwen2_5_vl"), tmp_path / kind)
        renamed = {}
        for name, tensor in weights.items():
            start_of_name = next((known for known in names if name.startswith(known)), "")
            renamed[names.get(start_of_name, "") + name.removeprefix(start_of_name)] = tensor.clone()
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.keys() != renamed.keys()
    expected = scores(start(others("qwen2_5_vl")))
    for order in (("plain", "hub", "plain", "hub"), ("hub", "plain", "hub")):
        engine = start(folders["qwen2_5_vl"])
        for number, kind in enumerate(order):
            engine.load_weights(tmp_path / kind, str(number))
            assert torch.equal(scores(engine), expected)
            engine.load_weights(folders["qwen2_5_vl"], f"other {number}")


def test_files_of_the_same_names_that_loading_changes_are_read_as_a_model_is(
    folders: dict[str, Path], others: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an architecture has its experts' matrices the other way round in files."""

    def convert(folder: Path, *args: Any) -> PreTrainedModel:
        model = load_model(folder, *args)
        model.get_parameter(NAME).data.neg_()
        return model

    monkeypatch.setattr(module, "load_model", convert)
    engine = start(others("qwen3_vl"))
    for number, folder in enumerate((folders["qwen3_vl"], others("qwen3_vl"), folders["qwen3_vl"])):
        engine.load_weights(folder, str(number))
        assert torch.equal(engine._model.get_parameter(NAME), -load_file(folder / "model.safetensors")[NAME])


def test_damaged_weights_are_refused_also_where_files_are_read_as_they_are(
    folders: dict[str, Path], others: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = start(folders["qwen3_vl"])
    engine.load_weights(others("qwen3_vl"), "other")
    before = scores(engine)
    bad = shutil.copytree(folders["qwen3_vl"], tmp_path / "bad")
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="must have whole weights"):
        engine.load_weights(bad, "bad")
    with pytest.raises(InputError, match="no such folder"):
        engine.load_weights(Path("no such folder"), "bad")
    assert torch.equal(scores(engine), before)


def without_tensor(weights: dict[str, torch.Tensor]) -> None:
    del weights[NAME]


def with_another_shape(weights: dict[str, torch.Tensor]) -> None:
    weights[NAME] = weights[NAME][:-1].clone()


@pytest.mark.parametrize("damage", [without_tensor, with_another_shape])
def test_weights_that_do_not_fit_are_refused_and_the_next_ones_are_taken(
    damage: Callable[[dict[str, torch.Tensor]], None],
    folders: dict[str, Path],
    others: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bad = shutil.copytree(others("qwen3_vl"), tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    damage(weights)
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    engine = start(folders["qwen3_vl"])
    before = scores(engine)
    with pytest.raises(InputError, match=NAME):
        engine.load_weights(bad, "bad")
    assert torch.equal(scores(engine), before)
    with pytest.raises(InputError, match=NAME):
        engine.load_weights(bad, "bad")
    engine.load_weights(others("qwen3_vl"), "other")
    assert torch.equal(scores(engine), scores(start(others("qwen3_vl"))))


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path]) -> None:
    engine = start(folders["qwen3_vl"])
    with pytest.raises(InputError, match="those of the model that the engine started with"):
        engine.load_weights(folders["qwen2_5_vl"], "other")
    engine.load_weights(folders["qwen3_vl"], "initial")
