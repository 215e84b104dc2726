"""Work given to vLLM servers is done once, in order, on the right weights, whatever happens to the servers."""

import asyncio
import base64
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import vllm_stand_in
from support.tiny_models import picture
from support.vllm_stand_in import GENERATE, VERSION, Asked, Fault, StandIn, made_up

from tasks.adapters.models import model_folder
from tasks.adapters.process_guard import find_process
from tasks.adapters.server_process import ServerError
from tasks.adapters.vllm_client import EncodedImage, VLLMClient, encode_image
from tasks.adapters.vllm_servers import MAX_ATTEMPTS, MAX_RECOVERIES, VLLMServers, Work
from tasks.config import ModelConfig, ServersConfig, VLLMEngine
from vzero_core.errors import InputError

PATIENCE = 30.0
"""Seconds until a test gives up."""
STUDENT, TEACHER = model_folder("embedded:student"), model_folder("embedded:teacher")
RESPONSE = 2
IMAGE = 8
EXCHANGE = [
    "/pause",
    "/update_weight_version",
    "/collective_rpc",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/resume",
    "/update_weight_version",
]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def stand_in(stack: ExitStack) -> Callable[..., StandIn]:
    return lambda **settings: stack.enter_context(StandIn(**settings))


@pytest.fixture
def make(tmp_path: Path, stack: ExitStack) -> Callable[..., VLLMServers]:
    """Give a function that makes servers, of our own or attached to."""

    def servers(*stand_ins: StandIn, role: str = "student", exchangeable: bool = True, **settings: Any) -> VLLMServers:
        made = VLLMServers(
            role,
            ModelConfig(path="embedded:student", engine=VLLMEngine(version=VERSION)),
            ServersConfig(
                urls=tuple(server.url + "/" for server in stand_ins),
                **{"start_timeout": 20.0, "request_timeout": 10.0, **settings},
            ),
            exchangeable=exchangeable,
            work_dir=tmp_path,
            threads=1,
            track=lambda *_: nullcontext(lambda _: None),
        )
        stack.callback(made.close)
        return made

    return servers


@pytest.fixture
def held(make: Callable[..., VLLMServers]) -> Callable[..., VLLMServers]:
    """Give a function that makes servers which hold the student."""

    def servers(*stand_ins: StandIn, **settings: Any) -> VLLMServers:
        made = make(*stand_ins, **settings)
        made.hold(STUDENT, "policy-0")
        return made

    return servers


def prompt(number: int, length: int = 6) -> list[int]:
    """Give token ids that no other number has."""
    return [10 + number // 40, 10 + number % 40] + [12] * (length - 2)


def work(token_ids: list[int], images: Sequence[EncodedImage] = (), **sampling: Any) -> Work[tuple[list[int], str]]:
    """Ask for a greedy response: its token ids, and the server that gave it."""

    async def call(client: VLLMClient) -> tuple[list[int], str]:
        reply = await client.generate(token_ids, images, {"max_tokens": RESPONSE, "temperature": 0, **sampling})
        return reply["choices"][0]["token_ids"], client.url

    return Work(len(token_ids) + RESPONSE, call)


def answer(token_ids: list[int]) -> list[int]:
    """Give the response that any server gives, by the slow way."""
    found: list[int] = []
    for _ in range(RESPONSE):
        context = [*token_ids, *found]
        found.append(max(range(vllm_stand_in.VOCABULARY), key=lambda token: made_up(context, token)))
    return found


def do(servers: VLLMServers, works: Sequence[Work[Any]]) -> list[Any]:
    """Do work and see that each piece counts once; give up where it takes for ever."""
    advanced: list[int] = []
    done = within(lambda: servers.run(works, advanced.append))
    assert advanced == [1] * len(works)
    return done


def within(call: Callable[[], Any]) -> Any:
    """Give what a call gives in a thread, or its error; fail where it does not end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not an executor's thread: for one that does not end, Python's own end would wait.
    threading.Thread(target=run, daemon=True).start()
    return future.result(PATIENCE)


def responses(done: Sequence[tuple[list[int], str]]) -> list[list[int]]:
    return [tokens for tokens, _ in done]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it must come true"
        time.sleep(0.005)


def first_times(fault: Fault, token_ids: Sequence[list[int]]) -> Callable[[Asked], Fault | None]:
    """Fail the first request of each of some prompts, wherever it is asked."""
    seen: set[tuple[int, ...]] = set()

    def decide(asked: Asked) -> Fault | None:
        key = tuple(asked.body.get("token_ids", ()))
        if list(key) not in token_ids or key in seen:
            return None
        seen.add(key)
        return fault

    return decide


# --- work ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, "500", "cut", "hang", "garbage"])
def test_work_is_done_once_and_in_order_under_faults(
    fault: Fault | None,
    stand_in: Callable[..., StandIn],
    held: Callable[..., VLLMServers],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = [prompt(number) for number in range(30)]
    decide = first_times(fault, prompts[::7]) if fault else lambda _: None
    stand_ins = [stand_in(fault=decide, delay=0.002 * number) for number in range(2)]
    servers = held(*stand_ins, request_timeout=1.0, max_tokens_in_flight=40)
    done = do(servers, [work(token_ids) for token_ids in prompts])
    assert responses(done) == [answer(token_ids) for token_ids in prompts]
    answered = Counter(tuple(ids) for server in stand_ins for ids in server.answered)
    assert answered == Counter(map(tuple, prompts))
    asked = sum(len(server.generations()) for server in stand_ins)
    assert asked == len(prompts) + (len(prompts[::7]) if fault else 0)
    assert bool(caplog.records) == (fault is not None)


def test_no_work_is_no_work(stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]) -> None:
    server = stand_in()
    assert do(held(server), []) == []
    assert not server.generations()


@pytest.mark.parametrize("number", [2, 3])
def test_the_server_with_the_fewest_tokens_in_flight_is_next(
    number: int, stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    stand_ins = [stand_in(delay=0.4), *(stand_in(delay=0.02) for _ in range(number - 1))]
    servers = held(*stand_ins, max_tokens_in_flight=16)
    do(servers, [work(prompt(index)) for index in range(24)])
    slow, *fast = [len(server.answered) for server in stand_ins]
    # It has room for two at a time, as each of them has.
    assert 2 <= slow < min(fast)


def test_load_is_counted_in_tokens(stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]) -> None:
    """The long one takes a server; the next three, together not as long, go to the other one."""
    stand_ins = [stand_in(delay=0.2) for _ in range(2)]
    prompts = [prompt(0, length=60), prompt(1), prompt(2), prompt(3)]
    done = do(held(*stand_ins), [work(token_ids) for token_ids in prompts])
    urls = [url for _, url in done]
    assert urls[0] not in urls[1:]
    assert len(set(urls[1:])) == 1


def test_a_server_has_no_more_tokens_in_flight_than_allowed(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    stand_ins = [stand_in(delay=0.1) for _ in range(2)]
    # 8 tokens each: 5 of them fit.
    servers = held(*stand_ins, max_tokens_in_flight=47)
    do(servers, [work(prompt(number)) for number in range(30)])
    assert [server.most_tokens for server in stand_ins] == [40, 40]
    # With a limit that is hit exactly.
    servers = held(stand_ins[0], max_tokens_in_flight=48)
    do(servers, [work(prompt(number)) for number in range(12)])
    assert stand_ins[0].most_tokens == 48


def test_a_piece_beyond_the_limit_runs_alone(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    running: list[int] = []
    seen: list[list[int]] = []

    def piece(number: int) -> Work[int]:
        cost = 62 if number in (0, 7) else 8

        async def call(_: VLLMClient) -> int:
            running.append(cost)
            seen.append(sorted(running))
            # They end one after the other, so that there are all numbers of them.
            await asyncio.sleep(0.01 * (1 + number % 5))
            running.remove(cost)
            return number

        return Work(cost, call)

    done = do(held(stand_in(), max_tokens_in_flight=40), [piece(number) for number in range(16)])
    assert done == list(range(16))
    assert seen.count([62]) == 2
    assert all(costs == [62] or costs == [8] * len(costs) for costs in seen)
    assert max(map(len, seen)) == 5


# --- lost and refused requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "cut", "garbage"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_poison_request_stops_the_run(
    fault: Fault, number: int, stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers], tmp_path: Path
) -> None:
    poison = prompt(5)
    stand_ins = [stand_in(fault=lambda asked: fault if asked.body.get("token_ids") == poison else None)] * number
    if number == 2:
        stand_ins[1] = stand_in(fault=stand_ins[0].fault)
    servers = held(*stand_ins)
    with pytest.raises(ServerError, match=r"^vLLM: the same requests were lost 4 times, the last time") as error:
        do(servers, [work(prompt(index)) for index in range(9)])
    assert str(tmp_path / "servers") in str(error.value)
    tried = [body["token_ids"] for server in stand_ins for body in server.generations()]
    assert tried.count(poison) == MAX_ATTEMPTS == 4


def test_a_refused_request_stops_the_run_at_once(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    server = stand_in(fault=lambda asked: "400" if asked.path == GENERATE else None)
    with pytest.raises(InputError, match=rf"{server.url} refuses {GENERATE} \(400\): .*not to its taste"):
        do(held(server), [work(prompt(0))])
    assert len(server.generations()) == 1


def test_a_request_without_a_reply_goes_elsewhere(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    hangs = stand_in(fault=lambda asked: "hang" if asked.path == GENERATE else None)
    works = stand_in()
    done = do(held(hangs, works, request_timeout=0.5), [work(prompt(number)) for number in range(6)])
    assert responses(done) == [answer(prompt(number)) for number in range(6)]
    assert {url for _, url in done} == {works.url}


def test_losses_with_good_replies_between_do_not_add_up(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    prompts = [prompt(number) for number in range(2 * MAX_RECOVERIES + 2)]
    server = stand_in(fault=first_times("500", prompts[::2]))
    # One at a time.
    done = do(held(server, max_tokens_in_flight=8), [work(ids) for ids in prompts])
    assert responses(done) == [answer(ids) for ids in prompts]
    assert len(server.generations()) == len(prompts) + MAX_RECOVERIES + 1


def test_a_sick_server_does_not_take_the_run_with_it(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    """It says that it is well and fails whatever it is asked; what it lost goes elsewhere first."""
    sick = stand_in(fault=lambda asked: "500" if asked.path == GENERATE else None)
    well = stand_in(delay=0.05)
    servers = held(sick, well, max_tokens_in_flight=16)
    done = do(servers, [work(prompt(number)) for number in range(20)])
    assert responses(done) == [answer(prompt(number)) for number in range(20)]
    assert {url for _, url in done} == {well.url}
    tries = Counter(tuple(body["token_ids"]) for body in sick.generations())
    assert max(tries.values()) == 1
    # It is asked no more after so many failures in a row, each by the two that it had room for.
    assert 1 <= len(sick.generations()) <= 2 * (MAX_RECOVERIES + 1)


def test_the_others_go_on_where_one_is_dead_for_good(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers], caplog: pytest.LogCaptureFixture
) -> None:
    dead, *living = [stand_in(delay=0.01) for _ in range(3)]
    servers = held(dead, *living, start_timeout=1.0, max_tokens_in_flight=16)
    dead.stop()
    prompts = [prompt(number) for number in range(12)]
    assert responses(do(servers, [work(ids) for ids in prompts])) == [answer(ids) for ids in prompts]
    assert any("waiting up to 1 s" in record.getMessage() for record in caplog.records)
    # New weights go to those that are left, and the dead one is waited for no more.
    caplog.clear()
    servers.hold(TEACHER, "policy-1")
    assert [server.weights for server in living] == ["policy-1"] * 2
    assert responses(do(servers, [work(ids) for ids in prompts])) == [answer(ids) for ids in prompts]
    assert not caplog.records
    # It is back after all, with the weights that it had.
    dead.start()
    done = do(servers, [work(ids) for ids in prompts])
    assert dead.weights == "policy-1"
    assert dead.url in {url for _, url in done}


def test_where_all_are_dead_the_run_ends(stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]) -> None:
    stand_ins = [stand_in() for _ in range(2)]
    servers = held(*stand_ins, start_timeout=1.0)
    for server in stand_ins:
        server.stop()
    with pytest.raises(ServerError, match=r"no server of the student is left; the last one: http.* is lost"):
        do(servers, [work(prompt(number)) for number in range(8)])
    with pytest.raises(ServerError, match="of the student"):
        within(lambda: servers.hold(TEACHER, "policy-1"))


@pytest.mark.parametrize("remembers", [True, False])
def test_a_server_that_comes_back_goes_on(
    remembers: bool,
    stand_in: Callable[..., StandIn],
    held: Callable[..., VLLMServers],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = stand_in(delay=0.1)
    servers = held(server, max_tokens_in_flight=16)
    num_exchanges = len(server.loaded)

    def away() -> None:
        wait_until(lambda: len(server.answered) >= 4)
        server.stop()
        if not remembers:
            server.weights = "default"
        time.sleep(2.0)
        server.start()

    other = threading.Thread(target=away)
    other.start()
    done = do(servers, [work(prompt(number)) for number in range(12)])
    other.join()
    assert responses(done) == [answer(prompt(number)) for number in range(12)]
    assert server.weights == "policy-0"
    assert len(server.loaded) == num_exchanges + (not remembers)
    assert any("waiting up to 20 s" in record.getMessage() for record in caplog.records)


def test_two_servers_that_come_back_are_both_given_the_weights(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    """At the same time: what one of them reads must not be taken away when the other is done."""
    stand_ins = [stand_in(delay=0.02) for _ in range(2)]
    servers = held(*stand_ins, max_tokens_in_flight=16)
    met = threading.Barrier(2)

    def fault(asked: Asked) -> Fault | None:
        if asked.path == "/pause":
            # Both have been given a folder before either reads it.
            met.wait(PATIENCE)
        return lose(asked)

    def fault_of_the_slower(asked: Asked) -> Fault | None:
        if asked.path == "/collective_rpc":
            wait_until(lambda: bool(stand_ins[0].loaded) and not Path(stand_ins[0].loaded[0][0]).exists())
        return fault(asked)

    lose = first_times("cut", [prompt(number) for number in range(4)])
    for server in stand_ins:
        server.weights = "default"
        server.loaded.clear()
    stand_ins[0].fault, stand_ins[1].fault = fault, fault_of_the_slower
    done = do(servers, [work(prompt(number)) for number in range(8)])
    assert responses(done) == [answer(prompt(number)) for number in range(8)]
    for server in stand_ins:
        assert server.weights == "policy-0"
        ((_, tensors),) = server.loaded
        assert "lm_head.weight" in tensors


# --- weights ------------------------------------------------------------------------------------------------------


def test_attaching_gives_a_server_the_weights(stand_in: Callable[..., StandIn], make: Callable[..., Any]) -> None:
    stand_ins = [stand_in(weights="of another run"), stand_in()]
    servers = make(*stand_ins)
    assert not any(server.asked for server in stand_ins)
    servers.hold(STUDENT, "policy-0")
    for server in stand_ins:
        assert server.paths() == ["/version", "/v1/models", "/server_info", "/weight_info", *EXCHANGE]
        assert server.weights == servers._replicas[0].named == "policy-0"


def test_the_digest_that_is_held_is_no_work(stand_in: Callable[..., StandIn], held: Callable[..., Any]) -> None:
    server = stand_in()
    servers = held(server)
    asked = len(server.asked)
    servers.hold(Path("no such folder"), "policy-0")
    assert len(server.asked) == asked


def test_new_weights_go_to_all_servers(
    stand_in: Callable[..., StandIn], held: Callable[..., Any], tmp_path: Path
) -> None:
    stand_ins = [stand_in() for _ in range(3)]
    servers = held(*stand_ins)
    for server in stand_ins:
        server.asked.clear()
        server.loaded.clear()
    servers.hold(TEACHER, "policy-1")
    assert {replica.named for replica in servers._replicas} == {"policy-1"}
    for server in stand_ins:
        assert server.paths() == EXCHANGE
        assert [asked.query for asked in server.asked if asked.path == "/pause"] == ["mode=wait&clear_cache=true"]
        named = [asked.body["new_version"] for asked in server.asked if asked.path == "/update_weight_version"]
        # Until all is done, a name that no policy has.
        assert named[1] == "policy-1"
        assert named[0] not in ("policy-0", "policy-1", "default")
        ((folder, tensors),) = server.loaded
        assert Path(folder).is_absolute()
        assert "lm_head.weight" in tensors
        assert not Path(folder).exists()


@pytest.mark.parametrize("path", dict.fromkeys(EXCHANGE))
@pytest.mark.parametrize("fault", ["500", "cut"])
def test_a_request_lost_during_an_exchange_is_made_good(
    path: str, fault: Fault, stand_in: Callable[..., StandIn], held: Callable[..., Any]
) -> None:
    stand_ins = [stand_in() for _ in range(2)]
    servers = held(*stand_ins)
    stand_ins[0].asked.clear()
    stand_ins[0].fault = lambda asked: fault if asked.path == path and asked.number == 0 else None
    servers.hold(TEACHER, "policy-1")
    for server in stand_ins:
        assert server.weights == "policy-1"
        assert not server.paused
        assert "lm_head.weight" in server.loaded[-1][1]
    assert len(do(servers, [work(prompt(number)) for number in range(4)])) == 4


def test_an_exchange_that_failed_is_tried_again(stand_in: Callable[..., StandIn], held: Callable[..., Any]) -> None:
    server = stand_in()
    servers = held(server, start_timeout=0.5)
    server.fault = lambda asked: "500" if asked.path == "/collective_rpc" else None
    with pytest.raises(ServerError, match="no vLLM server of the student can be given new weights"):
        servers.hold(TEACHER, "policy-1")
    assert server.weights not in ("policy-0", "policy-1")
    server.fault = lambda _: None
    servers.hold(TEACHER, "policy-1")
    assert server.weights == "policy-1"
    assert not server.paused


def test_a_start_that_failed_is_tried_again(stand_in: Callable[..., StandIn], make: Callable[..., Any]) -> None:
    server = stand_in()
    servers = make(server, start_timeout=0.5)
    server.stop()
    message = r"must answer, but within 0 s it did not: Cannot connect.*placement\.student_servers\.urls"
    with pytest.raises(ServerError, match=message):
        servers.hold(STUDENT, "policy-0")
    server.start()
    servers.hold(STUDENT, "policy-0")
    assert server.paths() == ["/version", "/v1/models", "/server_info", "/weight_info", *EXCHANGE]


# --- servers that are not what was configured ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "0.31.0"}, r"must be version 0\.32\.0 \(student\.engine\.version\), got 0\.31\.0"),
        ({"served_name": "llama"}, r"must serve 'vzero' \(placement\.student_servers\.served_name\), got \['llama'\]"),
        ({"dev_mode": False}, r"must let its weights be exchanged.*VLLM_SERVER_DEV_MODE=1"),
        ({"api_key": "right"}, r"must accept the API key, but it answered 401.*api_key_variable"),
    ],
)
def test_another_server_is_refused(
    settings: dict[str, Any], message: str, stand_in: Callable[..., StandIn], held: Callable[..., Any]
) -> None:
    server = stand_in(**settings)
    with pytest.raises(InputError, match=rf"vLLM server {server.url} {message}"):
        held(server)
    assert "/pause" not in server.paths()


def test_a_server_that_comes_back_as_another_is_refused(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    server = stand_in()
    servers = held(server)
    server.version = "0.33.0"
    server.fault = first_times("cut", [prompt(0)])
    with pytest.raises(InputError, match=r"must be version 0\.32\.0"):
        do(servers, [work(prompt(0))])


def test_the_api_key_is_read_and_sent_and_shown_nowhere(
    stand_in: Callable[..., StandIn],
    make: Callable[..., VLLMServers],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server = stand_in(api_key="sk-right")
    with pytest.raises(InputError, match=f"variable VZERO_TEST_KEY must hold the API key of {server.url}"):
        make(server, api_key_variable="VZERO_TEST_KEY")
    monkeypatch.setenv("VZERO_TEST_KEY", "sk-wrong")
    with pytest.raises(InputError, match="401") as refused:
        make(server, api_key_variable="VZERO_TEST_KEY").hold(STUDENT, "policy-0")
    # The end of the line that an editor leaves in a file is not part of the key.
    monkeypatch.setenv("VZERO_TEST_KEY", "sk-right\n")
    servers = make(server, api_key_variable="VZERO_TEST_KEY")
    servers.hold(STUDENT, "policy-0")
    assert len(do(servers, [work(prompt(0))])) == 1
    server.fault = lambda asked: "500" if asked.path == GENERATE else None
    with pytest.raises(ServerError) as lost:
        do(servers, [work(prompt(0))])
    shown = [str(refused.value), str(lost.value), repr(servers), *(str(record.__dict__) for record in caplog.records)]
    assert len(shown) > 6
    assert not any("sk-right" in text or "sk-wrong" in text for text in shown)


def test_a_teacher_with_other_weights_is_refused(stand_in: Callable[..., StandIn], make: Callable[..., Any]) -> None:
    server = stand_in(weights="another")
    servers = make(server, role="teacher", exchangeable=False)
    with pytest.raises(InputError, match=rf"{server.url} must hold the weights mine of .* but it names another"):
        servers.hold(TEACHER, "mine")


@pytest.mark.parametrize(
    ("settings", "named"), [({"weights": "mine"}, "mine"), ({}, "default"), ({"dev_mode": False}, None)]
)
def test_a_teacher_is_taken_as_it_is(
    settings: dict[str, Any],
    named: str | None,
    stand_in: Callable[..., StandIn],
    make: Callable[..., VLLMServers],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = stand_in(**settings)
    servers = make(server, role="teacher", exchangeable=False)
    servers.hold(TEACHER, "mine")
    servers.hold(TEACHER, "mine")
    assert server.paths() == ["/version", "/v1/models", "/server_info", "/weight_info"]
    assert servers._replicas[0].named == named
    warned = [record.getMessage() for record in caplog.records if "does not name its weights" in record.getMessage()]
    assert len(warned) == (named != "mine")
    assert len(do(servers, [work(prompt(0))])) == 1
    # And after a request is lost it is still the same.
    server.fault = first_times("cut", [prompt(1)])
    assert len(do(servers, [work(prompt(1))])) == 1
    assert servers._replicas[0].named == named


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "float16", "quantization": "fp8"}])
def test_a_server_that_computes_otherwise_is_refused(
    settings: dict[str, Any], stand_in: Callable[..., StandIn], make: Callable[..., VLLMServers]
) -> None:
    servers = make(stand_in(**settings), role="teacher", exchangeable=False)
    with pytest.raises(InputError, match=rf"must compute in float32 .*teacher\.dtype.* got {settings['dtype']} with"):
        servers.hold(TEACHER, "mine")


def test_of_two_teachers_one_may_name_its_weights(
    stand_in: Callable[..., StandIn], make: Callable[..., VLLMServers]
) -> None:
    """Each is held to what it names itself."""
    servers = make(stand_in(weights="mine"), stand_in(), role="teacher", exchangeable=False)
    servers.hold(TEACHER, "mine")
    assert [replica.named for replica in servers._replicas] == ["mine", "default"]

    async def named(client: VLLMClient) -> tuple[str, str | None]:
        return client.url, client.weights

    expected = {replica.url: replica.named for replica in servers._replicas}
    assert {expected[url] == weights for url, weights in do(servers, [Work(1, named)] * 8)} == {True}


def test_lost_work_does_not_wait_for_the_server_that_lost_it(
    stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    dead, living = stand_in(), stand_in()
    servers = held(dead, living, start_timeout=600.0, max_tokens_in_flight=16)
    dead.stop()
    # The dead one is waited for ten minutes; `do` gives up far sooner.
    prompts = [prompt(number) for number in range(12)]
    assert responses(do(servers, [work(ids) for ids in prompts])) == [answer(ids) for ids in prompts]
    servers.hold(TEACHER, "policy-1")
    assert responses(do(servers, [work(ids) for ids in prompts])) == [answer(ids) for ids in prompts]


# --- images -------------------------------------------------------------------------------------------------------


def parts(server: StandIn) -> list[list[tuple[bool, str]]]:
    """Give, for each generation, whether each image was sent whole, and its name."""
    return [
        [(part["url"] is not None, part["uuid"]) for part in body["content_parts"]] for body in server.generations()
    ]


def test_an_image_is_sent_once_and_then_named(stand_in: Callable[..., StandIn], held: Callable[..., Any]) -> None:
    server = stand_in()
    servers = held(server)
    one, other = (encode_image(picture(32, 16, seed)) for seed in (0, 1))

    def ask(*images: EncodedImage) -> None:
        do(servers, [work([10, *[IMAGE] * len(images), 11], images)])

    ask(one)
    ask(one, other)
    ask(other, one)
    first, second = (True, one.digest), (True, other.digest)
    first_named, second_named = (False, one.digest), (False, other.digest)
    assert parts(server) == [[first], [first_named, second], [second_named, first_named]]
    # Forgotten: it is told so, and sends all again.
    server.forget_images()
    ask(other, one)
    assert parts(server)[3:] == [[second_named, first_named], [second, first]]
    ask(one)
    assert parts(server)[5:] == [[first_named]]
    # What was made of them with other weights is forgotten with those.
    servers.hold(TEACHER, "policy-1")
    ask(one)
    assert parts(server)[6:] == [[first]]


def test_an_encoded_image_is_the_image() -> None:
    image = picture(23, 17, 3)
    encoded = encode_image(image)
    content = base64.b64decode(encoded.url.removeprefix("data:image/png;base64,"))
    decoded = Image.open(io.BytesIO(content))
    assert decoded.format == "PNG"
    assert decoded.tobytes() == image.tobytes()
    assert encode_image(picture(23, 17, 3)) == encoded
    assert encode_image(picture(23, 17, 4)).digest != encoded.digest


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hang", None])
def test_closing_ends_work_that_another_thread_does(
    fault: Fault | None, stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]
) -> None:
    server = stand_in(delay=0.05, fault=lambda asked: fault if asked.path == GENERATE else None)
    servers = held(server, max_tokens_in_flight=8, request_timeout=3600.0)

    def close() -> None:
        wait_until(lambda: bool(server.generations()))
        servers.close()

    other = threading.Thread(target=close)
    other.start()
    with pytest.raises(ServerError, match="servers of the student were stopped while they were at work"):
        do(servers, [work(prompt(number)) for number in range(200)])
    other.join()
    assert len(server.generations()) < 100


def test_closing_ends_the_wait_for_a_server(stand_in: Callable[..., StandIn], held: Callable[..., VLLMServers]) -> None:
    server = stand_in()
    servers = held(server, start_timeout=3600.0)
    server.stop()
    closer = threading.Timer(0.5, servers.close)
    closer.start()
    with pytest.raises(ServerError, match="were stopped while they were at work"):
        do(servers, [work(prompt(0))])
    closer.join()


# --- servers of our own -------------------------------------------------------------------------------------------


class Own:
    """Stand-ins that are started as vLLM's servers are, and what they say of themselves."""

    def __init__(self, folder: Path, make: Callable[..., VLLMServers], *options: str, **settings: Any) -> None:
        self.journal = folder / "journal.jsonl"
        program = (sys.executable, vllm_stand_in.__file__, f"--journal={self.journal}", *options)
        self.servers = make(command=program, **settings)

    def entries(self, key: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []
        return [line for line in lines if key in line]

    @property
    def pids(self) -> list[int]:
        return [entry["pid"] for entry in self.entries("start")]

    def names_of(self, pid: int) -> list[str]:
        entries = [entry for entry in self.entries("path") if entry["pid"] == pid]
        return [entry["body"]["new_version"] for entry in entries if entry["path"] == "/update_weight_version"]


@pytest.fixture
def own(tmp_path: Path, make: Callable[..., VLLMServers]) -> Callable[..., Own]:
    return lambda *options, **settings: Own(tmp_path, make, *options, **settings)


def left(one: Own, tmp_path: Path) -> list[Any]:
    living = [pid for pid in one.pids if find_process(pid) is not None]
    return [*living, *(tmp_path / "servers").glob("*.json"), *(tmp_path / "servers").glob("*weights*")]


def test_replicas_start_side_by_side_and_each_on_its_gpus(own: Callable[..., Own], tmp_path: Path) -> None:
    """None of them is healthy before all have been started."""
    one = own("--siblings=2", replicas=2, tensor_parallel=2, devices=("4", "5", "6", "7"), served_name="policy")
    one.servers.hold(STUDENT, "policy-0")
    started = one.entries("start")
    assert {entry["devices"] for entry in started} == {"4,5", "6,7"}
    for entry in started:
        assert entry["flags"][:4] == ["--model", str(STUDENT), "--host", "127.0.0.1"]
        assert one.names_of(entry["pid"]) == ["policy-0"]
    prompts = [prompt(number) for number in range(10)]
    done = do(one.servers, [work(ids) for ids in prompts])
    assert responses(done) == [answer(ids) for ids in prompts]
    assert {url for _, url in done} == {f"http://127.0.0.1:{entry['start']}" for entry in started}
    # Weights are exchanged in place, and nothing of them stays.
    one.servers.hold(TEACHER, "policy-1")
    assert len(one.pids) == 2
    assert all(one.names_of(pid)[-1] == "policy-1" for pid in one.pids)
    assert sorted(path.name for path in (tmp_path / "servers").glob("*.log")) == ["student-0.log", "student-1.log"]
    assert not any("VLLM_API_KEY" in path.read_text() for path in (tmp_path / "servers").glob("*.log"))
    one.servers.close()
    assert not left(one, tmp_path)
    one.servers.close()


def test_a_killed_server_is_started_again_on_the_weights_that_are_wanted_now(
    own: Callable[..., Own], tmp_path: Path
) -> None:
    one = own("--delay=0.02", max_tokens_in_flight=24)
    one.servers.hold(STUDENT, "policy-0")
    one.servers.hold(TEACHER, "policy-1")
    (first,) = one.pids
    done: list[int] = []

    def advance(count: int) -> None:
        done.append(count)
        if len(done) == 3:
            os.kill(first, signal.SIGKILL)

    prompts = [prompt(number) for number in range(12)]
    found = within(lambda: one.servers.run([work(ids) for ids in prompts], advance))
    assert responses(found) == [answer(ids) for ids in prompts]
    assert done == [1] * 12
    _, second = one.pids
    assert one.names_of(second) == ["policy-1"]
    assert one.entries("start")[1]["flags"][:2] == ["--model", str(TEACHER)]
    one.servers.close()
    assert not left(one, tmp_path)


def test_a_request_that_kills_its_server_stops_the_run(own: Callable[..., Own], tmp_path: Path) -> None:
    one = own("--kill-on=50")
    one.servers.hold(STUDENT, "policy-0")
    with pytest.raises(ServerError, match="the same requests were lost 4 times"):
        do(one.servers, [work([10, 50, 12])])
    # The first start, and one after each loss but the last.
    assert len(one.pids) == MAX_ATTEMPTS <= 1 + MAX_RECOVERIES
    one.servers.close()
    assert not left(one, tmp_path)


def test_a_server_is_brought_back_only_so_often(own: Callable[..., Own], tmp_path: Path) -> None:
    """One that takes no request at all: pieces of work that are lost by turns do not keep it starting."""
    one = own("--kill-on=12")
    one.servers.hold(STUDENT, "policy-0")
    with pytest.raises(ServerError):
        do(one.servers, [work(prompt(number)) for number in range(6)])
    assert 2 <= len(one.pids) <= 1 + MAX_RECOVERIES
    one.servers.close()
    assert not left(one, tmp_path)


def test_a_server_that_only_fails_is_started_anew(own: Callable[..., Own]) -> None:
    """It says that it is well: the first time it is believed."""
    one = own("--fail-on=50")
    one.servers.hold(STUDENT, "policy-0")
    with pytest.raises(ServerError, match=r"lost 4 times.*answered 500"):
        do(one.servers, [work([10, 50, 12])])
    assert len(one.pids) == MAX_RECOVERIES


def test_closing_ends_a_restart(own: Callable[..., Own], tmp_path: Path) -> None:
    """No server is started behind the back of who closes."""
    one = own("--delay=0.02")
    one.servers.hold(STUDENT, "policy-0")

    def close() -> None:
        os.kill(one.pids[0], signal.SIGKILL)
        wait_until(lambda: len(one.pids) == 2)
        one.servers.close()

    other = threading.Thread(target=close)
    other.start()
    with pytest.raises(ServerError, match="were stopped while they were at work"):
        do(one.servers, [work(prompt(number)) for number in range(2000)])
    other.join()
    assert not left(one, tmp_path)
    assert len(one.pids) == 2


def test_one_replica_that_does_not_start_ends_the_others(own: Callable[..., Own], tmp_path: Path) -> None:
    one = own("--siblings=3", replicas=2, start_timeout=1.5)
    with pytest.raises(ServerError, match=r"student-\d server must be healthy within 2 s"):
        one.servers.hold(STUDENT, "policy-0")
    assert not left(one, tmp_path)


def test_a_server_that_is_lost_as_soon_as_it_starts(own: Callable[..., Own], tmp_path: Path) -> None:
    one = own("--fail-path=/version")
    with pytest.raises(ServerError, match=r"lost as soon as it is started: .* answered 500 to /version"):
        one.servers.hold(STUDENT, "policy-0")
    assert not left(one, tmp_path)


def test_nothing_is_started_after_closing(own: Callable[..., Own]) -> None:
    one = own()
    one.servers.close()
    with pytest.raises(ServerError, match="were stopped"):
        one.servers.hold(STUDENT, "policy-0")
    assert not one.pids
