"""The vLLM engine on a stand-in: what it asks, what it makes of the replies, and which replies it does not take."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.plain import with_top_k
from support.tiny_models import picture
from support.vllm_stand_in import GENERATE, VERSION, VOCABULARY, Asked, Fault, StandIn, made_up

from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.server_process import ServerError
from tasks.adapters.vllm_engine import VLLMEngine
from tasks.adapters.vllm_servers import VLLMServers
from tasks.config import ModelConfig, PromptConfig, ServersConfig
from tasks.config import VLLMEngine as VLLMEngineConfig
from tasks.ports import Prompt, ReplayRequest, Response, ResponseScores, SamplingRequest
from vzero_core.errors import InputError

FOLDER, OTHER = model_folder("embedded:student"), model_folder("embedded:teacher")
EOS, IMAGE = 1, 8
SPECIAL = tuple(range(10))
"""All of them but the end of a turn are banned (tokenizer.json)."""
SIZES = ((64, 32), (32, 48))
RESPONSES = ((14, 15, 1), (14, 20, 21, 22, 1))


def visual_tokens(image: Image.Image) -> int:
    """Patches of 8 x 8 pixels, merged 2 x 2 (preprocessor_config.json); no side here needs rounding."""
    return image.width // 16 * (image.height // 16)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[VLLMEngine, StandIn]]]:
    """Give a function that makes an engine with the student's weights on a stand-in."""
    with ExitStack() as stack:

        def engine(
            *,
            folder: Path = FOLDER,
            read_prefix_cache: bool = False,
            role: str = "student",
            request_timeout: float = 5.0,
            **settings: Any,
        ) -> tuple[VLLMEngine, StandIn]:
            server = stack.enter_context(StandIn(**{"visual_tokens": visual_tokens, **settings}))
            servers = VLLMServers(
                role,
                ModelConfig(path="embedded:student", engine=VLLMEngineConfig(version=VERSION)),
                ServersConfig(urls=(server.url,), start_timeout=10.0, request_timeout=request_timeout),
                exchangeable=role == "student",
                work_dir=tmp_path,
                threads=1,
                track=lambda *_: nullcontext(lambda _: None),
            )
            made = VLLMEngine(servers, folder, read_prefix_cache=read_prefix_cache)
            stack.callback(made.close)
            made.load_weights(folder, "policy-0")
            server.asked.clear()
            return made, server

        yield engine


@pytest.fixture(scope="module")
def processor() -> PromptProcessor:
    return PromptProcessor(FOLDER)


def prompts(processor: PromptProcessor) -> list[Prompt]:
    """Give two prompts, with one image and with two."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    return [
        processor.prompt("digit on the red square ?", images[:1], PromptConfig()),
        processor.prompt("digit on the blue circle ?", images, PromptConfig()),
    ]


def expanded(processor: PromptProcessor, prompt: Prompt) -> list[int]:
    """Give a prompt's token ids as the trainer sees them."""
    ids: list[int] = processor.encode(prompt)["input_ids"][0].tolist()
    return ids


def sample(
    engine: VLLMEngine,
    wanted: Sequence[Prompt],
    seeds: Sequence[int] = (7, 8, 9),
    temperature: float = 1.0,
    **settings: Any,
) -> list[list[Response]]:
    advanced: list[int] = []
    requests = [SamplingRequest(prompt, tuple(seeds)) for prompt in wanted]
    found = engine.sample(requests, temperature=temperature, max_new_tokens=6, advance=advanced.append, **settings)
    assert advanced == [1] * len(requests)
    return found


def score(engine: VLLMEngine, wanted: Sequence[Prompt], top_k: int = 0) -> list[list[ResponseScores]]:
    requests = [ReplayRequest(prompt, RESPONSES) for prompt in wanted]
    return engine.score(with_top_k(requests, top_k), advance=lambda _: None)


def require_right(
    processor: PromptProcessor, wanted: Sequence[Prompt], found: list[list[ResponseScores]], top_k: int = 0
) -> None:
    """Compare scores with those that follow from the made-up log-probs, the slow way."""
    assert [len(group) for group in found] == [len(RESPONSES)] * len(wanted)
    for prompt, group in zip(wanted, found, strict=True):
        ids = expanded(processor, prompt)
        for response, scores in zip(RESPONSES, group, strict=True):
            contexts = [[*ids, *response[:at]] for at in range(len(response))]
            own = [made_up(context, token) for context, token in zip(contexts, response, strict=True)]
            assert scores.logprobs.tolist() == own
            assert scores.num_tokens == len(ids) + len(response)
            assert scores.topk_ids.dtype == torch.int64
            assert scores.topk_ids.shape == scores.topk_logprobs.shape == (len(response), top_k)
            for context, top_ids, top in zip(
                contexts, scores.topk_ids.tolist(), scores.topk_logprobs.tolist(), strict=True
            ):
                assert top == sorted((made_up(context, token) for token in range(VOCABULARY)), reverse=True)[:top_k]
                assert top == [made_up(context, token) for token in top_ids]
                assert len(set(top_ids)) == top_k


# --- sampling -----------------------------------------------------------------------------------------------------


def test_what_is_asked_for_a_sample(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make()
    wanted = prompts(processor)
    # Far above what a signed 64-bit number holds.
    sample(engine, wanted, seeds=(2**70 + 12345, 5, 6))
    bodies = sorted(server.generations(), key=lambda body: len(body["content_parts"]))
    for prompt, body in zip(wanted, bodies, strict=True):
        ids = body.pop("token_ids")
        assert ids == processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        assert ids.count(IMAGE) == len(prompt.images)
        parts = body.pop("content_parts")
        assert [part["type"] for part in parts] == ["image_url"] * len(prompt.images)
        assert len({part["uuid"] for part in parts}) == len(prompt.images)
        assert body == {
            "model": "vzero",
            "return_token_ids": True,
            "sampling_params": {
                "detokenize": False,
                "n": 3,
                # 2^70 is a multiple of 2^62, the number of seeds.
                "seed": 12345,
                "temperature": 1.0,
                "max_tokens": 6,
                "logprobs": 0,
                "stop_token_ids": [EOS],
                "logit_bias": {str(token): -100.0 for token in SPECIAL if token != EOS},
            },
        }


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.8},
        {"top_k": 20},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.5},
        {"top_p": 0.8, "top_k": 20, "presence_penalty": 1.5},
    ],
)
def test_settings_that_change_probabilities_are_asked_for_where_they_are_set(
    settings: dict[str, Any], make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make()
    sample(engine, prompts(processor)[:1])
    sample(engine, prompts(processor)[:1], **settings)
    without, given = (body["sampling_params"] for body in server.generations())
    assert given == without | settings
    assert not {"top_p", "top_k", "presence_penalty"} & {*without}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_responses_are_those_of_the_server(
    temperature: float, make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    # A server may give the responses of a prompt in any order.
    engine, server = make(alter=lambda _, reply: reply["choices"].reverse())
    wanted = prompts(processor)
    seeds = (7,) if temperature == 0 else tuple(range(30))
    groups = sample(engine, wanted, seeds, temperature)
    ends = set()
    for prompt, group in zip(wanted, groups, strict=True):
        ids = expanded(processor, prompt)
        assert len(group) == len(seeds)
        for index, response in enumerate(group):
            tokens = response.token_ids
            assert not set(tokens) & set(SPECIAL) - {EOS}
            assert response.truncated == (tokens[-1] != EOS)
            assert len(tokens) == 6 or not response.truncated
            ends.add(response.truncated)
            assert list(response.logprobs) == [made_up([*ids, *tokens[:at]], tokens[at]) for at in range(len(tokens))]
            words = processor.tokenizer.convert_ids_to_tokens([token for token in tokens if token != EOS])
            assert response.text.split() == words
            assert response.weights == "policy-0"
            sampling = {"max_tokens": 6, "temperature": temperature, "seed": 7 if temperature == 0 else 0}
            banned = {str(token): -100 for token in SPECIAL if token != EOS}
            choice = server._choice(ids, {**sampling, "stop_token_ids": [EOS], "logit_bias": banned}, index)
            assert list(tokens) == choice["token_ids"]
    assert temperature == 0 or ends == {True, False}


def nan(choice: dict[str, Any]) -> None:
    choice["logprobs"]["content"][0]["logprob"] = float("nan")


def infinite(choice: dict[str, Any]) -> None:
    choice["logprobs"]["content"][-1]["logprob"] = float("-inf")


def null(choice: dict[str, Any]) -> None:
    choice["logprobs"]["content"][-1]["logprob"] = None


def short(choice: dict[str, Any]) -> None:
    choice["logprobs"]["content"].pop()


def aborted(choice: dict[str, Any]) -> None:
    choice["finish_reason"] = "abort"


def empty(choice: dict[str, Any]) -> None:
    choice["token_ids"], choice["logprobs"]["content"] = [], []


@pytest.mark.parametrize("damage", [nan, infinite, null, short, aborted, empty])
def test_a_bad_response_is_asked_for_again(
    damage: Callable[[dict[str, Any]], None],
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    engine, server = make()
    wanted = prompts(processor)[:1]
    right = sample(engine, wanted)
    server.asked.clear()
    server.alter = lambda asked, reply: damage(reply["choices"][1]) if asked.number == 0 else None
    assert sample(engine, wanted) == right
    assert len(server.generations()) == 2


def test_too_few_responses_are_asked_for_again(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make(alter=lambda asked, reply: reply["choices"].pop() if asked.number == 0 else None)
    ((*group,),) = sample(engine, prompts(processor)[:1])
    assert len(group) == 3
    assert len(server.generations()) == 2


def test_a_server_that_gives_no_numbers_stops_the_run(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make(alter=lambda _, reply: nan(reply["choices"][0]))
    with pytest.raises(ServerError, match=r"lost 4 times, the last time because http.* log-probs that are no numbers"):
        sample(engine, prompts(processor)[:1])
    assert len(server.generations()) == 4


def test_a_banned_token_stops_the_run(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    def alter(_: Asked, reply: dict[str, Any]) -> None:
        reply["choices"][0]["token_ids"][0] = IMAGE

    engine, server = make(alter=alter)
    with pytest.raises(ServerError, match="sampled token 8, which is banned"):
        sample(engine, prompts(processor)[:1])
    assert len(server.generations()) == 1


# --- replies to something else ------------------------------------------------------------------------------------


def another_word(_: Asked, reply: dict[str, Any]) -> None:
    reply["prompt_token_ids"][0] += 1


def no_image(_: Asked, reply: dict[str, Any]) -> None:
    reply["mm_placeholders"] = None


@pytest.mark.parametrize("call", [sample, score])
@pytest.mark.parametrize(
    "settings",
    [{"visual_tokens": lambda image: visual_tokens(image) + 1}, {"alter": another_word}, {"alter": no_image}],
)
def test_a_server_that_sees_another_prompt_is_refused(
    settings: dict[str, Any],
    call: Callable[..., Any],
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    engine, server = make(**settings)
    (prompt, _) = prompts(processor)
    number = len(expanded(processor, prompt))
    with pytest.raises(
        InputError,
        match=rf"{server.url} must see a prompt as its processor does, ({number} tokens with 1 images|with token 4 as "
        r"number 0 outside images), but it sees",
    ):
        call(engine, [prompt])


def changed(server: StandIn) -> None:
    server.weights = "of another run"


def mixed(server: StandIn) -> None:
    def alter(_: Asked, reply: dict[str, Any]) -> None:
        reply["choices"][-1]["weight_versions"].append({"version": "of another run", "start": 1, "end": 2})

    server.alter = alter


def unnamed(server: StandIn) -> None:
    def alter(_: Asked, reply: dict[str, Any]) -> None:
        reply["choices"][-1]["weight_versions"] = None

    server.alter = alter


@pytest.mark.parametrize("call", [sample, score])
@pytest.mark.parametrize("how", [changed, mixed, unnamed])
def test_weights_that_changed_under_us_are_found(
    how: Callable[[StandIn], None],
    call: Callable[..., Any],
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    engine, server = make()
    call(engine, prompts(processor))
    how(server)
    with pytest.raises(ServerError, match=rf"{server.url} must answer with the weights policy-0, but it names"):
        call(engine, prompts(processor))


@pytest.mark.parametrize("version", ["default", None])
def test_a_teacher_whose_weights_have_no_name(
    version: str | None, make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    def alter(_: Asked, reply: dict[str, Any]) -> None:
        if version is None:
            for choice in reply["choices"]:
                choice["weight_versions"] = None

    engine, _ = make(role="teacher", dev_mode=False, alter=alter)
    wanted = prompts(processor)
    assert {response.weights for group in sample(engine, wanted) for response in group} == {version}
    require_right(processor, wanted, score(engine, wanted))


# --- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCABULARY])
def test_scores_are_those_of_the_responses_tokens(
    top_k: int, make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make()
    wanted = prompts(processor)
    found = score(engine, wanted, top_k)
    require_right(processor, wanted, found, top_k)
    assert all(scores.num_computed_tokens == scores.num_tokens for group in found for scores in group)
    replays = [body for body in server.generations() if body["content_parts"]]
    assert len(replays) == 4
    for body in replays:
        assert body["sampling_params"] == {
            "detokenize": False,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top_k,
        }
        assert body["token_ids"].count(IMAGE) == len(body["content_parts"])
        assert "cache_salt" not in body
    # Each prompt's first image travels with its first response alone.
    assert sum(body["content_parts"][0]["url"] is not None for body in replays) <= 2


def test_equally_likely_tokens_stand_by_their_number(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    """So that the same reply gives the same artefact; the stand-in gives the larger number first."""
    engine, _ = make()
    ties = 0
    for group in score(engine, prompts(processor), 12):
        for scores in group:
            for ids, values in zip(scores.topk_ids.tolist(), scores.topk_logprobs.tolist(), strict=True):
                for at in range(len(ids) - 1):
                    assert values[at] >= values[at + 1]
                    if values[at] == values[at + 1]:
                        ties += 1
                        assert ids[at] < ids[at + 1]
    # 55 tokens on 16 levels: a third of twelve neighbours at the least.
    assert ties > 30


def own_nan(row: dict[str, Any], token: int) -> None:
    row[str(token)]["logprob"] = float("nan")


def own_null(row: dict[str, Any], token: int) -> None:
    row[str(token)]["logprob"] = None


def other_nan(row: dict[str, Any], token: int) -> None:
    next(entry for name, entry in row.items() if name != str(token))["logprob"] = float("nan")


def other_null(row: dict[str, Any], token: int) -> None:
    next(entry for name, entry in row.items() if name != str(token))["logprob"] = None


@pytest.mark.parametrize("damage", [own_nan, own_null, other_nan, other_null])
def test_scores_that_are_no_numbers_are_asked_for_again(
    damage: Callable[[dict[str, Any], int], None],
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    def alter(asked: Asked, reply: dict[str, Any]) -> None:
        if asked.number == 0:
            damage(reply["prompt_logprobs"][-1], reply["prompt_token_ids"][-1])

    engine, server = make(alter=alter)
    wanted = prompts(processor)[:1]
    require_right(processor, wanted, score(engine, wanted, 5), 5)
    assert len(server.generations()) == 3


# --- given ids ----------------------------------------------------------------------------------------------------


def test_given_ids_are_scored_where_the_server_can(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make(scores_given_ids=True)
    wanted = prompts(processor)
    require_right(processor, wanted, score(engine, wanted))
    probe, *replays = server.generations()
    # Asked once, without an image.
    assert probe["content_parts"] == []
    assert len(replays) == 4
    lengths = {len(prompt.images): len(expanded(processor, prompt)) for prompt in wanted}
    for body in replays:
        number = len(body["content_parts"])
        response = next(r for r in RESPONSES if tuple(body["token_ids"][-len(r) :]) == r)
        assert body["sampling_params"] == {
            "detokenize": False,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprob_token_ids": [[token] for token in response],
            "prompt_logprob_start": lengths[number] - 1,
        }
    require_right(processor, wanted, score(engine, wanted))
    assert len(server.generations()) == 9
    # With a top-k there is no such way.
    require_right(processor, wanted, score(engine, wanted, 3), 3)
    assert all("prompt_logprobs" in body["sampling_params"] for body in server.generations()[9:])


def test_a_server_without_them_is_asked_once(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make()
    wanted = prompts(processor)
    for _ in range(2):
        require_right(processor, wanted, score(engine, wanted))
    asked = ["prompt_logprob_token_ids" in body["sampling_params"] for body in server.generations()]
    assert asked == [True] + [False] * 8


def test_another_refusal_of_the_probe_is_an_error(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make(fault=lambda asked: "400" if asked.path == GENERATE else None)
    with pytest.raises(InputError, match="not to its taste"):
        score(engine, prompts(processor))
    assert len(server.generations()) == 1


def test_rows_of_another_number_stop_the_run(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    def alter(asked: Asked, reply: dict[str, Any]) -> None:
        if asked.body["content_parts"]:
            rows = [[token] for token in RESPONSES[0]]
            reply["prompt_token_id_logprobs"] = server._given(
                [10] * 4 + [12] * len(rows), [*rows, [1]], len(RESPONSES[0]) - 1
            )

    engine, server = make(scores_given_ids=True, alter=alter)
    with pytest.raises(ServerError, match=r"gave rows \(4, 1\) for a response of 3 tokens"):
        score(engine, prompts(processor)[:1])


# --- the prefix cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 4])
def test_a_prompt_is_read_from_the_cache(
    top_k: int, make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    wanted = prompts(processor)
    lengths = [len(expanded(processor, prompt)) for prompt in wanted]
    # Blocks that end before the prompts do, and not at their end.
    block = next(size for size in range(5, 12) if all(length % size for length in lengths))
    engine, server = make(read_prefix_cache=True, block_size=block, scores_given_ids=True)
    found = score(engine, wanted, top_k)
    require_right(processor, wanted, found, top_k)
    for length, group in zip(lengths, found, strict=True):
        for scores in group:
            assert scores.num_computed_tokens == scores.num_tokens - length // block * block
    bodies = [body for body in server.generations() if body["content_parts"]]
    assert len(bodies) == 6
    for number in (1, 2):
        primed, *replays = [body for body in bodies if len(body["content_parts"]) == number]
        assert primed["sampling_params"] == {"detokenize": False, "max_tokens": 1, "temperature": 0}
        assert len(replays) == 2
        assert {body["cache_salt"] for body in replays} == {primed["cache_salt"]}
        for body in replays:
            assert body["token_ids"][: len(primed["token_ids"])] == primed["token_ids"]
            assert body["sampling_params"]["prompt_logprobs"] == top_k
            assert body["sampling_params"]["skip_reading_prefix_cache"] is False
    # A salt for each prompt.
    assert len({body["cache_salt"] for body in bodies}) == 2


def test_the_same_words_on_another_image_have_another_salt(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    """To a server's cache they look alike until the image's own hash is looked at."""
    engine, server = make(read_prefix_cache=True)
    wanted = [processor.prompt("the ?", [picture(32, 32, seed)], PromptConfig()) for seed in range(2)]
    score(engine, wanted, 1)
    assert len({body["cache_salt"] for body in server.generations()}) == 2


def test_a_prompt_that_was_cached_to_its_end_is_asked_again_without(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, server = make(read_prefix_cache=True, block_size=1)
    wanted = prompts(processor)
    found = score(engine, wanted, 4)
    require_right(processor, wanted, found, 4)
    assert all(scores.num_computed_tokens == scores.num_tokens for group in found for scores in group)
    # Each prompt: primed, then for each response once from the cache and once without.
    assert len(server.generations()) == 10
    assert sum("cache_salt" not in body for body in server.generations()) == 4


@pytest.mark.parametrize("fault", ["400", "500", "garbage"])
def test_a_cached_reply_that_cannot_be_written_is_asked_again_without(
    fault: Fault, make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    def reads(asked: Asked) -> Fault | None:
        return fault if "skip_reading_prefix_cache" in asked.body.get("sampling_params", {}) else None

    engine, server = make(read_prefix_cache=True, fault=reads)
    wanted = prompts(processor)
    require_right(processor, wanted, score(engine, wanted, 2), 2)
    assert len(server.generations()) == 10


# --- weights ------------------------------------------------------------------------------------------------------

NAME = "model.language_model.norm.weight"


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME] = tensors[NAME][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tensor, NAME),
        (with_another_shape, NAME),
        (cut_short, "whole weights"),
        (without_weights, "must have weights"),
    ],
)
def test_a_bad_folder_is_refused_before_any_request(
    damage: Callable[[Path], None],
    message: str,
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
    tmp_path: Path,
) -> None:
    engine, server = make()
    bad = shutil.copytree(FOLDER, tmp_path / "bad")
    damage(bad)
    with pytest.raises(InputError, match=message):
        engine.load_weights(bad, "policy-1")
    assert not server.asked
    wanted = prompts(processor)
    assert {response.weights for group in sample(engine, wanted) for response in group} == {"policy-0"}


def test_responses_name_the_weights_that_were_loaded_last(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor, tmp_path: Path
) -> None:
    engine, server = make()
    other = shutil.copytree(FOLDER, tmp_path / "other")
    engine.load_weights(other, "policy-1")
    assert {response.weights for group in sample(engine, prompts(processor)) for response in group} == {"policy-1"}
    asked = len(server.asked)
    engine.load_weights(other, "policy-1")
    assert len(server.asked) == asked


# --- limits and forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "room"), [(sample, 6), (score, max(map(len, RESPONSES)) + 1)])
def test_a_prompt_too_long_for_the_server_is_refused_before_it_is_sent(
    call: Callable[..., Any],
    room: int,
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    (prompt, _) = prompts(processor)
    needed = len(expanded(processor, prompt)) + room
    engine, _ = make(max_model_len=needed)
    call(engine, [prompt])
    engine, server = make(max_model_len=needed - 1)
    with pytest.raises(InputError, match=rf"at most the {needed - 1} tokens .*max_model_len.*, got {needed}"):
        call(engine, [prompt])
    assert "/inference/v1/generate" not in server.paths()


@pytest.mark.parametrize(("call", "key"), [(sample, "choices"), (score, "prompt_logprobs")])
def test_a_reply_of_another_form_stops_the_run(
    call: Callable[..., Any],
    key: str,
    make: Callable[..., tuple[VLLMEngine, StandIn]],
    processor: PromptProcessor,
) -> None:
    engine, _ = make(alter=lambda _, reply: reply.pop(key))
    with pytest.raises(ServerError, match=rf"its reply cannot be read \(KeyError: '{key}'\)"):
        call(engine, prompts(processor))


def test_a_server_that_does_not_tell_what_it_cached_is_not_trusted(
    make: Callable[..., tuple[VLLMEngine, StandIn]], processor: PromptProcessor
) -> None:
    engine, _ = make(read_prefix_cache=True, alter=lambda _, reply: reply["usage"].pop("prompt_tokens_details"))
    wanted = prompts(processor)
    require_right(processor, wanted, score(engine, wanted))


# --- weights of folders that transformers writes otherwise than it found them ----------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl"])
def test_what_transformers_drops_may_be_lacking(
    family: str, folders: dict[str, Path], tmp_path: Path, make: Callable[..., tuple[VLLMEngine, StandIn]]
) -> None:
    """Heads for speculative decoding, and an output layer whose weights are the input embedding's."""
    first = tmp_path / "first"
    shutil.copytree(folders[family], first)
    extra = "mtp.fc.weight" if family == "qwen3_5" else "lm_head.weight"
    save_file({extra: torch.zeros(2, 2)}, first / "extra.safetensors", metadata={"format": "pt"})
    written = tmp_path / "written"
    shutil.copytree(folders[family], written)
    engine, server = make(folder=first)
    engine.load_weights(written, "policy-1")
    assert server.weights == "policy-1"

    # What the model cannot do without may not be lacking.
    tensors = load_file(written / "model.safetensors")
    del tensors["model.visual.patch_embed.proj.bias"]
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"differ in name or shape: model\.visual\.patch_embed\.proj\.bias"):
        engine.load_weights(written, "policy-2")
    assert server.weights == "policy-1"
