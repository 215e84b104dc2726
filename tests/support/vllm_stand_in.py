"""A server in place of vLLM's: the routes that are used of it, made-up log-probs, and faults on request.

In a thread of a test (`StandIn`), or as a program that is started like vLLM's (`python vllm_stand_in.py --port ...`).
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from aiohttp import web
from PIL import Image
from safetensors import safe_open

VERSION = "0.32.0"
VOCABULARY = 55
"""Tokens of the small world's models."""
LEVELS = 16
"""Different log-probs; fewer than tokens, so that some are equal."""
GARBAGE = 77.0
"""What stands in rows of cached positions: no log-prob."""
GUARDED = ("/v1", "/inference")
"""Paths that ask for the API key, as in vLLM 0.32; the others do not."""
GENERATE = "/inference/v1/generate"

Fault = Literal["500", "400", "404", "cut", "hang", "garbage"]


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    path: str
    query: str
    body: dict[str, Any]
    number: int
    """How many requests to this path came before it."""


def made_up(context: Sequence[int], token: int) -> float:
    """Give the log-prob of a token after others: a hash of them all."""
    content = np.asarray([*context, token], dtype=np.int64).tobytes()
    return -0.25 - int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) % LEVELS / 2


class StandIn:
    """A server on a port of 127.0.0.1, in a thread of its own; it can be stopped and started again."""

    def __init__(
        self,
        *,
        version: str = VERSION,
        served_name: str = "vzero",
        weights: str = "default",
        dtype: str = "float32",
        quantization: str | None = None,
        max_model_len: int | None = None,
        api_key: str | None = None,
        dev_mode: bool = True,
        scores_given_ids: bool = False,
        visual_tokens: Callable[[Image.Image], int] = lambda _: 4,
        image_id: int = 8,
        block_size: int = 4,
        delay: float = 0.0,
        fault: Callable[[Asked], Fault | None] = lambda _: None,
        alter: Callable[[Asked, dict[str, Any]], None] = lambda *_: None,
        port: int = 0,
    ) -> None:
        """Set what it says and how it fails.

        Args:
            version: of vLLM.
            served_name: of the model.
            weights: name of the weights.
            dtype: arithmetic.
            quantization: of the weights.
            max_model_len: tokens of prompt and response together.
            api_key: that it asks for.
            dev_mode: the routes that exchange weights are there.
            scores_given_ids: takes `prompt_logprob_token_ids`, as vLLM's newer runner does.
            visual_tokens: number of an image's tokens.
            image_id: the placeholder.
            block_size: tokens that the prefix cache keeps together.
            delay: seconds that a generation takes.
            fault: what goes wrong with a request, if anything.
            alter: changes the reply to a generation.
            port: where it listens; 0: a free one.
        """
        self.version = version
        self.served_name = served_name
        self.weights = weights
        self.dtype = dtype
        self.quantization = quantization
        self.max_model_len = max_model_len
        self.api_key = api_key
        self.dev_mode = dev_mode
        self.scores_given_ids = scores_given_ids
        self.visual_tokens = visual_tokens
        self.image_id = image_id
        self.block_size = block_size
        self.delay = delay
        self.fault = fault
        self.alter = alter
        self.port = port
        self.asked: list[Asked] = []
        self.answered: list[list[int]] = []
        """Token ids of the generations that were answered well."""
        self.loaded: list[tuple[str, frozenset[str]]] = []
        """Folder and names of the tensors of every exchange of weights."""
        self.most_tokens = 0
        self.most_requests = 0
        self._tokens: list[int] = []
        self._images: dict[str, int] = {}
        self._cached: list[tuple[str | None, list[int]]] = []
        self.paused = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        """Give the paths of all requests but those for its health, in their order."""
        return [asked.path for asked in self.asked if asked.path != "/health"]

    def generations(self) -> list[dict[str, Any]]:
        """Give the bodies of all requests for a generation."""
        return [asked.body for asked in self.asked if asked.path == GENERATE]

    def forget_images(self) -> None:
        self._images.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30), "it starts at once"

    def stop(self) -> None:
        """Cut all connections and end; nothing where it is stopped."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _work(self, ready: threading.Event) -> None:
        runner = web.AppRunner(self.app(), shutdown_timeout=0, handler_cancellation=True, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    # --- routes -------------------------------------------------------------------------------------------------

    def app(self) -> web.Application:
        """Give the routes, for whoever serves them."""
        self._tokens, self.paused = [], False
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        number = sum(asked.path == request.path for asked in self.asked)
        asked = Asked(request.path, request.query_string, body, number)
        self.asked.append(asked)
        if request.path.startswith(GUARDED) and self.api_key not in (None, _bearer(request)):
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path == GENERATE:
            return await self._counted(request, asked)
        return await self._faulty(request, asked) or await self._answer(asked)

    async def _counted(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        sampling = asked.body["sampling_params"]
        cost = len(asked.body["token_ids"]) + sampling.get("n", 1) * sampling["max_tokens"]
        while self.paused:
            await asyncio.sleep(0.01)
        self._tokens.append(cost)
        self.most_tokens = max(self.most_tokens, sum(self._tokens))
        self.most_requests = max(self.most_requests, len(self._tokens))
        try:
            await asyncio.sleep(self.delay)
            if (response := await self._faulty(request, asked)) is not None:
                return response
            try:
                reply = self._generate(asked.body)
            except ValueError as error:
                return _refused(str(error))
            self.alter(asked, reply)
            self.answered.append(asked.body["token_ids"])
            return web.json_response(reply)
        finally:
            self._tokens.remove(cost)

    async def _faulty(self, request: web.Request, asked: Asked) -> web.StreamResponse | None:
        match self.fault(asked):
            case "cut":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case "hang":
                await asyncio.sleep(3600)
            case "garbage":
                return web.Response(text="<html>a proxy's page</html>")
            case "400":
                return _refused("it is not to its taste")
            case "500" | "404" as status:
                return web.Response(status=int(status), text="so it goes")
        return None

    async def _answer(self, asked: Asked) -> web.StreamResponse:
        match asked.path:
            case "/health":
                return web.Response()
            case "/version":
                return web.json_response({"version": self.version})
            case "/v1/models":
                return web.json_response({"data": [{"id": self.served_name, "max_model_len": self.max_model_len}]})
        if not self.dev_mode:
            return web.json_response({"detail": "Not Found"}, status=404)
        match asked.path:
            case "/server_info":
                model = {"dtype": f"torch.{self.dtype}", "quantization": self.quantization}
                return web.json_response({"vllm_config": {"model_config": model}})
            case "/weight_info":
                return web.json_response({"weight_version": self.weights})
            case "/update_weight_version":
                self.weights = asked.body["new_version"]
                return web.json_response({"success": True, "new_version": self.weights})
            case "/pause":
                self.paused = True
                while self._tokens:
                    await asyncio.sleep(0.01)
                return web.json_response({"status": "paused"})
            case "/resume":
                self.paused = False
                return web.json_response({"status": "resumed"})
            case "/collective_rpc":
                assert asked.body["method"] == "reload_weights"
                folder = asked.body["kwargs"]["weights_path"]
                self.loaded.append((folder, _tensors(Path(folder))))
                return web.json_response({"results": [None]})
            case "/reset_mm_cache":
                self._images.clear()
                return web.Response()
            case "/reset_encoder_cache":
                return web.Response()
        return web.json_response({"detail": "Not Found"}, status=404)

    # --- generation ---------------------------------------------------------------------------------------------

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] != self.served_name:
            raise ValueError(f"The model `{body['model']}` does not exist.")
        sampling = body["sampling_params"]
        prompt, ranges = self._expand(body)
        cached = self._num_cached(body, prompt)
        choices = [self._choice(prompt, sampling, index) for index in range(sampling.get("n", 1))]
        self._cached.append((body.get("cache_salt"), prompt))
        reply: dict[str, Any] = {
            "choices": choices,
            "usage": {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}},
            "prompt_token_ids": prompt,
            "mm_placeholders": {"image": ranges} if ranges else None,
            "prompt_logprobs": None,
            "prompt_token_id_logprobs": None,
        }
        if (top_k := sampling.get("prompt_logprobs")) is not None:
            reply["prompt_logprobs"] = [None, *(_row(prompt[:at], prompt[at], top_k) for at in range(1, len(prompt)))]
            for row in reply["prompt_logprobs"][1 : cached + 1]:
                for entry in row.values():
                    entry["logprob"] = GARBAGE
        if (wanted := sampling.get("prompt_logprob_token_ids")) is not None:
            reply["prompt_token_id_logprobs"] = self._given(prompt, wanted, sampling["prompt_logprob_start"])
        return reply

    def _expand(self, body: dict[str, Any]) -> tuple[list[int], list[dict[str, int]]]:
        """Give the prompt with its images expanded, and where they stand in it."""
        parts = iter(body["content_parts"])
        prompt: list[int] = []
        ranges = []
        for token in body["token_ids"]:
            if token == self.image_id:
                index, part = len(ranges), next(parts, None)
                if part is None:
                    raise ValueError("more placeholders than images")
                if part["uuid"] not in self._images:
                    if part["url"] is None:
                        raise ValueError(f"Cache miss for image at index {index} but data is not provided.")
                    encoded = base64.b64decode(part["url"].removeprefix("data:image/png;base64,"), validate=True)
                    self._images[part["uuid"]] = self.visual_tokens(Image.open(io.BytesIO(encoded)))
                length = self._images[part["uuid"]]
                ranges.append({"offset": len(prompt), "length": length})
                prompt += [token] * length
            else:
                prompt.append(token)
        if next(parts, None) is not None:
            raise ValueError("more images than placeholders")
        return prompt, ranges

    def _num_cached(self, body: dict[str, Any], prompt: list[int]) -> int:
        sampling = body["sampling_params"]
        skips = sampling.get("skip_reading_prefix_cache", sampling.get("prompt_logprobs") is not None)
        if skips:
            return 0
        salt = body.get("cache_salt")
        shared = [_common(prompt, other) for other_salt, other in self._cached if other_salt == salt]
        # The last token is always computed.
        longest = min(max(shared, default=0), len(prompt) - 1)
        return longest // self.block_size * self.block_size

    def _choice(self, prompt: list[int], sampling: dict[str, Any], index: int) -> dict[str, Any]:
        banned = {int(token) for token, bias in sampling.get("logit_bias", {}).items() if bias <= -100}
        allowed = [token for token in range(VOCABULARY) if token not in banned]
        found: list[int] = []
        ends = False
        while not ends and len(found) < sampling["max_tokens"]:
            context = [*prompt, *found]
            if sampling["temperature"] == 0:
                token = max(allowed, key=lambda token: made_up(context, token))
            else:
                draw = hashlib.blake2b(repr((context, sampling["seed"] + index)).encode(), digest_size=4).digest()
                token = allowed[int.from_bytes(draw) % len(allowed)]
            found.append(token)
            ends = token in sampling.get("stop_token_ids", [])
        content = [
            {"token_id": token, "logprob": made_up([*prompt, *found[:at]], token)} for at, token in enumerate(found)
        ]
        return {
            "index": index,
            "token_ids": found,
            "finish_reason": "stop" if ends else "length",
            "logprobs": {"content": content} if "logprobs" in sampling else None,
            "weight_versions": [{"version": self.weights, "start": 0, "end": len(found)}],
        }

    def _given(self, prompt: list[int], wanted: list[list[int]], start: int) -> str:
        if not self.scores_given_ids:
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1).")
        if len(wanted) != len(prompt) - 1 - start:
            raise ValueError(
                f"prompt_logprob_token_ids has {len(wanted)} rows, but the prompt has {len(prompt) - 1 - start}"
            )
        rows = [[made_up(prompt[: start + 1 + at], token) for token in row] for at, row in enumerate(wanted)]
        stream = io.BytesIO()
        np.save(stream, np.array(rows, dtype=np.float32), allow_pickle=False)
        return base64.b64encode(stream.getbuffer()).decode()


def _bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _refused(message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "BadRequestError", "code": 400}}, status=400)


def _tensors(folder: Path) -> frozenset[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names.update(file.keys())
    assert names, f"no weights in {folder}"
    return frozenset(names)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for at, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return at
    return min(len(one), len(other))


def _row(context: list[int], own: int, top_k: int) -> dict[str, dict[str, float]]:
    """Give a prompt position's row: its own token first, then the likeliest, of equal ones the last first."""
    ranked = sorted(range(VOCABULARY), key=lambda token: (made_up(context, token), token), reverse=True)[:top_k]
    return {str(token): {"logprob": made_up(context, token)} for token in dict.fromkeys([own, *ranked])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--journal", type=Path, required=True, help="a JSON line for each start and each request")
    parser.add_argument("--kill-on", type=int, help="a prompt with this token kills the server")
    parser.add_argument("--fail-on", type=int, help="a prompt with this token is answered by 500")
    parser.add_argument("--fail-path", help="requests to this path are answered by 500")
    parser.add_argument("--siblings", type=int, default=1, help="healthy only when so many servers were started")
    parser.add_argument("--delay", type=float, default=0.0)
    options, others = parser.parse_known_args()

    def note(**entry: Any) -> None:
        with options.journal.open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), **entry}) + "\n")

    def fault(asked: Asked) -> Fault | None:
        if asked.path != "/health":
            note(path=asked.path, body=asked.body)
        elif options.journal.read_text().count('"start"') < options.siblings:
            return "500"
        if asked.path == GENERATE and options.kill_on in asked.body["token_ids"]:
            os.kill(os.getpid(), signal.SIGKILL)
        fails = asked.path == GENERATE and options.fail_on in asked.body["token_ids"]
        return "500" if fails or asked.path == options.fail_path else None

    note(start=options.port, flags=others, devices=os.environ.get("CUDA_VISIBLE_DEVICES"))
    server = StandIn(
        served_name=options.served_model_name, api_key=os.environ["VLLM_API_KEY"], delay=options.delay, fault=fault
    )
    web.run_app(server.app(), host="127.0.0.1", port=options.port, print=lambda *_: None, access_log=None)


if __name__ == "__main__":
    main()
