"""The vLLM engine on real vLLM servers: the same numbers as the engine in the box, and servers that can be lost."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.plain import with_top_k
from support.tiny_models import picture
from support.vllm_cpu_servers import cpu_servers, make_engine, on_vllm, processes, shared_memory

from tasks.adapters.models import model_folder
from tasks.adapters.server_process import ServerError
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.adapters.vllm_engine import VLLMEngine
from tasks.config import PromptConfig
from tasks.ports import ReplayRequest, Response, ResponseScores, SamplingRequest
from vzero_core.errors import InputError

pytestmark = pytest.mark.vllm

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
PARITY = 1e-4
"""Nats, in float32."""
KEY = "VZERO_TEST_VLLM_KEY"


def ignore(count: int) -> None:
    """Progress that nobody sees."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    """A server that was started on the student's weights."""
    engine = make_engine(on_vllm(STUDENT), cpu_servers(), tmp_path_factory.mktemp("vllm"))
    engine.load_weights(model_folder(STUDENT), "student")
    yield engine
    engine.close()


@pytest.fixture
def student(engine: VLLMEngine) -> VLLMEngine:
    """The same, with the student's weights whatever a test left there."""
    engine.load_weights(model_folder(STUDENT), "student")
    return engine


def plain(path: str) -> TransformersEngine:
    """The engine in the box."""
    return TransformersEngine(model_folder(path), path, dtype="float32", device="cpu", max_batch_tokens=16_384)


def address(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the engine's server is, its key put where a configuration names it."""
    monkeypatch.setenv(KEY, engine._servers._api_key or "")
    return engine._servers._replicas[0].url


def sampling(engine: VLLMEngine, number: int, group: int = 8) -> list[SamplingRequest]:
    """Questions about different pictures."""
    return [
        SamplingRequest(
            engine.processor.prompt("what color is the sign", [picture(64, 64, seed)], PromptConfig()),
            tuple(range(1000 * seed, 1000 * seed + group)),
        )
        for seed in range(number)
    ]


def replays(engine: VLLMEngine, groups: Sequence[Sequence[Response]], *, crop: bool) -> list[ReplayRequest]:
    """The same responses, after the full image alone or with a crop beside it."""
    requests = []
    for seed, group in enumerate(groups):
        images = [picture(64, 64, seed), picture(32, 32, 100 + seed)][: 1 + crop]
        prompt = engine.processor.prompt("what color is the sign", images, PromptConfig())
        requests.append(ReplayRequest(prompt, tuple(response.token_ids for response in group)))
    return requests


def difference(ours: list[list[ResponseScores]], theirs: list[list[ResponseScores]]) -> float:
    """Largest difference of any log-prob, nats."""
    pairs = [pair for left, right in zip(ours, theirs, strict=True) for pair in zip(left, right, strict=True)]
    return max(
        max(
            float((left.logprobs - right.logprobs).abs().max()),
            float((left.topk_logprobs - right.topk_logprobs).abs().max()) if left.topk_ids.shape[1] else 0.0,
        )
        for left, right in pairs
    )


def test_replay_gives_the_log_probs_of_the_engine_in_the_box(
    student: VLLMEngine, record_property: Callable[[str, object], None]
) -> None:
    responses = student.sample(sampling(student, 6), temperature=1.0, max_new_tokens=8, advance=ignore)
    reference = plain(STUDENT)
    for crop in (False, True):
        requests = replays(student, responses, crop=crop)
        for top_k in (0, 1, 10):
            done: list[int] = []
            ours = student.score(with_top_k(requests, top_k), advance=done.append)
            theirs = reference.score(with_top_k(requests, top_k), advance=ignore)
            largest = difference(ours, theirs)
            record_property(f"largest difference, crop {crop}, top {top_k}", largest)
            assert largest <= PARITY
            assert sum(done) == len(requests)
            for left, right in zip((s for group in ours for s in group), (s for g in theirs for s in g), strict=True):
                assert torch.equal(left.topk_ids, right.topk_ids)
                assert left.num_tokens == left.num_computed_tokens == right.num_tokens


def test_rollouts_have_the_log_probs_of_the_engine_in_the_box(student: VLLMEngine) -> None:
    responses = student.sample(sampling(student, 6), temperature=1.0, max_new_tokens=8, advance=ignore)
    theirs = plain(STUDENT).score(replays(student, responses, crop=False), advance=ignore)
    for group, scores in zip(responses, theirs, strict=True):
        for response, score in zip(group, scores, strict=True):
            assert torch.allclose(torch.tensor(response.logprobs), score.logprobs, rtol=0, atol=PARITY)
            assert response.weights == "student"


def test_rollouts_follow_from_their_seeds(student: VLLMEngine) -> None:
    requests = sampling(student, 4)
    first = student.sample(requests, temperature=1.0, max_new_tokens=8, advance=ignore)
    again = student.sample(requests[::-1], temperature=1.0, max_new_tokens=8, advance=ignore)
    assert again[::-1] == first
    others = [SamplingRequest(request.prompt, tuple(seed + 50 for seed in request.seeds)) for request in requests]
    assert student.sample(others, temperature=1.0, max_new_tokens=8, advance=ignore) != first


def test_greedy_responses_are_those_of_the_engine_in_the_box(student: VLLMEngine) -> None:
    requests = [SamplingRequest(request.prompt, (0,)) for request in sampling(student, 6)]
    ours = student.sample(requests, temperature=0.0, max_new_tokens=8, advance=ignore)
    theirs = plain(STUDENT).sample(requests, temperature=0.0, max_new_tokens=8, advance=ignore)
    for (left,), (right,) in zip(ours, theirs, strict=True):
        assert (left.token_ids, left.text, left.truncated) == (right.token_ids, right.text, right.truncated)


def test_settings_that_change_probabilities_mean_the_same_to_the_engine_in_the_box(
    student: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they leave one token: otherwise the two draw differently."""
    reference = plain(STUDENT)
    # An answer that may not end repeats itself, unless that is penalised.
    monkeypatch.setattr(student, "_banned", student._banned | {*student._eos_ids})
    monkeypatch.setattr(reference, "_banned", torch.tensor(sorted(student._banned)))
    requests = [SamplingRequest(request.prompt, (0,)) for request in sampling(student, 6)]

    def sampled(
        engine: VLLMEngine | TransformersEngine, temperature: float, **settings: float
    ) -> list[tuple[int, ...]]:
        groups = engine.sample(requests, temperature=temperature, max_new_tokens=8, advance=ignore, **settings)
        return [response.token_ids for (response,) in groups]

    greedy = sampled(reference, 0.0)
    for penalty in (2.0, -2.0):
        expected = sampled(reference, 0.0, presence_penalty=penalty)
        assert expected != greedy
        for temperature, settings in ((0.0, {}), (2.0, {"top_k": 1}), (2.0, {"top_p": 1e-3})):
            assert sampled(student, temperature, presence_penalty=penalty, **settings) == expected


def test_banned_tokens_are_never_sampled_and_cut_responses_say_so(
    student: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sampling(student, 4)

    def sampled() -> list[Response]:
        groups = student.sample(requests, temperature=1.0, max_new_tokens=4, advance=ignore)
        return [response for group in groups for response in group]

    # What it likes best of all stands in for the special tokens, which it hardly ever likes.
    liked = {response.token_ids[0] for response in sampled()}
    monkeypatch.setattr(student, "_banned", student._banned | liked)
    responses = sampled()
    assert not student._banned & {token for response in responses for token in response.token_ids}
    for response in responses:
        assert response.truncated == (response.token_ids[-1] not in student._eos_ids)
    assert {response.truncated for response in responses} == {True, False}


def test_exchanged_weights_are_those_of_the_new_folder(student: VLLMEngine) -> None:
    # Both models' output layers share their weights with the input embedding, which a plain reload gets wrong.
    responses = student.sample(sampling(student, 3), temperature=1.0, max_new_tokens=8, advance=ignore)
    for path in (TEACHER, STUDENT, TEACHER):
        student.load_weights(model_folder(path), path)
        requests = replays(student, responses, crop=True)
        ours = student.score(with_top_k(requests, 5), advance=ignore)
        assert difference(ours, plain(path).score(with_top_k(requests, 5), advance=ignore)) <= PARITY
        (response,), *_ = student.sample(
            [SamplingRequest(requests[0].prompt, (0,))], temperature=1.0, max_new_tokens=2, advance=ignore
        )
        assert response.weights == path


def test_a_bad_folder_is_refused_and_the_old_weights_stay(student: VLLMEngine, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="must have whole weights"):
        student.load_weights(tmp_path, "bad")
    (response,), *_ = student.sample(sampling(student, 1, 1), temperature=1.0, max_new_tokens=2, advance=ignore)
    assert response.weights == "student"


def test_a_running_server_is_attached_to(student: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = cpu_servers(urls=[address(student, monkeypatch)], api_key_variable=KEY)
    attached = make_engine(on_vllm(TEACHER), where, tmp_path)
    attached.load_weights(model_folder(TEACHER), "attached")
    responses = attached.sample(sampling(attached, 2), temperature=1.0, max_new_tokens=8, advance=ignore)
    requests = replays(attached, responses, crop=True)
    scores = attached.score(requests, advance=ignore)
    assert difference(scores, plain(TEACHER).score(requests, advance=ignore)) <= PARITY
    attached.close()

    # It took the server's weights away from its owner, who must notice.
    with pytest.raises(ServerError, match="must answer with the weights student, but it names"):
        student.sample(sampling(student, 1), temperature=1.0, max_new_tokens=2, advance=ignore)
    student._servers._digest = "attached"


def test_another_server_than_configured_is_refused(
    student: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = address(student, monkeypatch)
    monkeypatch.setenv("WRONG_KEY", "nobody's")
    model = on_vllm(STUDENT)
    older = model.model_copy(update={"engine": model.engine.model_copy(update={"version": "0.31.0"})})
    for config, wanted, message in (
        (model, {"served_name": "other"}, "must serve 'other'"),
        (model, {"api_key_variable": "WRONG_KEY"}, "must accept the API key"),
        (older, {}, "must be version 0.31.0"),
    ):
        where = cpu_servers(urls=[url], **{"api_key_variable": KEY, **wanted})
        with pytest.raises(InputError, match=message):
            make_engine(config, where, tmp_path).load_weights(model_folder(STUDENT), "student")
    where = cpu_servers(urls=[url], api_key_variable=KEY)
    with pytest.raises(InputError, match=r"must hold the weights teacher .* but it names student"):
        make_engine(model, where, tmp_path, exchangeable=False).load_weights(model_folder(STUDENT), "teacher")


def test_a_prompt_of_more_tokens_than_the_server_takes_is_refused(student: VLLMEngine) -> None:
    long = student.processor.prompt("what color is the sign " * 60, [picture(64, 64, 0)], PromptConfig())
    with pytest.raises(InputError, match=r"at most the 256 tokens .*\(max_model_len\), got 322"):
        student.sample([SamplingRequest(long, (0,))], temperature=1.0, max_new_tokens=2, advance=ignore)


def test_the_prefix_cache_saves_work_and_changes_no_log_prob(student: VLLMEngine) -> None:
    question = "what color is the sign " * 8
    images = [picture(64, 64, 0), picture(32, 32, 1)]
    prompt = student.processor.prompt(question, images, PromptConfig())
    response = student.sample(sampling(student, 1), temperature=1.0, max_new_tokens=8, advance=ignore)[0]
    request = ReplayRequest(prompt, tuple(sampled.token_ids for sampled in response))
    reference = plain(STUDENT).score(with_top_k([request], 3), advance=ignore)
    student._read_prefix_cache = True
    try:
        cached = student.score(with_top_k([request], 3), advance=ignore)
    finally:
        student._read_prefix_cache = False
    assert difference(cached, reference) <= PARITY
    computed, asked = (
        sum(getattr(score, name) for score in cached[0]) for name in ("num_computed_tokens", "num_tokens")
    )
    # Two blocks of 32 tokens of a prompt of 66 are in the cache; now and then a reply is asked for again without it.
    assert reference[0][0].num_tokens - len(response[0].token_ids) == 66
    assert asked - computed in {64 * number for number in range(1, len(response) + 1)}


def test_a_server_killed_at_work_is_started_anew_and_nothing_is_missing(student: VLLMEngine) -> None:
    requests = sampling(student, 24)
    expected = student.sample(requests, temperature=1.0, max_new_tokens=8, advance=ignore)
    url, done = student._servers._replicas[0].url, []

    def advance(count: int) -> None:
        done.append(count)
        if len(done) == 4:
            end_server(url)

    assert student.sample(requests, temperature=1.0, max_new_tokens=8, advance=advance) == expected
    assert sum(done) == len(requests)
    assert student._servers._replicas[0].url != url


def test_a_server_that_hangs_is_started_anew(student: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student._servers, "_config", student._servers._config.model_copy(update={"request_timeout": 8}))
    requests = sampling(student, 4)
    expected = student.sample(requests, temperature=1.0, max_new_tokens=8, advance=ignore)
    session = os.getsid(server_pid(student._servers._replicas[0].url))
    for process in members(session):
        os.kill(process, signal.SIGSTOP)
    # The program that guards the others is no part of what hangs.
    os.kill(session, signal.SIGCONT)
    assert student.sample(requests, temperature=1.0, max_new_tokens=8, advance=ignore) == expected


def test_closing_ends_work_that_another_thread_does(tmp_path: Path, engine: VLLMEngine) -> None:
    """Last of all, because it closes the server of this module."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            engine.sample(sampling(engine, 200), temperature=1.0, max_new_tokens=8, advance=started.append)
        except ServerError as error:
            errors.append(error)

    started: list[int] = []
    engine.load_weights(model_folder(STUDENT), "student")
    used = shared_memory()
    thread = threading.Thread(target=work)
    thread.start()
    while not started:
        time.sleep(0.01)
    engine.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert "were stopped" in str(errors[0])
    assert processes() == {}
    assert used
    assert not [path for path in used if path.exists()]


def server_pid(url: str) -> int:
    """The process that listens on a server's port."""
    port = url.rsplit(":", 1)[1]
    found = subprocess.run(["pgrep", "-f", f"api_server.*--port {port} "], capture_output=True, text=True, check=True)
    return max(map(int, found.stdout.split()))


def end_server(url: str) -> None:
    """Kill the API server alone, as the kernel does where memory runs out: its engines are left."""
    os.kill(server_pid(url), signal.SIGKILL)


def members(session: int) -> list[int]:
    """All processes of a session."""
    found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]
