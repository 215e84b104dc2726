"""Samples and replays on vLLM servers: token ids in, token ids out (docs/VLLM.md)."""

import asyncio
import base64
import hashlib
import io
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

from tasks.adapters.models import dropped_tensors, weight_shapes
from tasks.adapters.prompts import PromptProcessor, banned_ids, end_of_turn_ids
from tasks.adapters.server_process import ServerError
from tasks.adapters.vllm_client import (
    EncodedImage,
    LostRequestError,
    RefusedRequestError,
    VLLMClient,
    encode_image,
    together,
)
from tasks.adapters.vllm_servers import VLLMServers, Work
from tasks.ports import Advance, Prompt, ReplayRequest, Response, ResponseScores, SamplingRequest
from vzero_core.errors import InputError

_MAX_SEED = 1 << 62
"""vLLM's seeds are signed 64-bit numbers, and each response of a prompt adds its number."""
_BAN = -100.0
"""Logit bias of a banned token, the lowest that vLLM takes."""
_Ask = Callable[..., Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class _Asked:
    """A prompt as a server is asked: its token ids with one placeholder per image, and how many it must see."""

    prompt: Prompt
    token_ids: list[int]
    num_tokens: int

    async def images(self) -> list[EncodedImage]:
        """Encode the images, beside the event loop: a large one takes a second."""
        return await asyncio.to_thread(lambda: [encode_image(image) for image in self.prompt.images])


class VLLMEngine:
    """One model on vLLM servers; a PolicyEngine and a TeacherScorer."""

    def __init__(self, servers: VLLMServers, folder: Path, *, read_prefix_cache: bool) -> None:
        """Set how prompts are written; servers are started when weights are first loaded.

        Args:
            servers: where the model runs.
            folder: model folder; whatever weights follow have its configuration.
            read_prefix_cache: replay may read the prompt from the servers' cache.
        """
        self._servers = servers
        self._shapes = weight_shapes(folder)
        self._read_prefix_cache = read_prefix_cache
        self._scores_given_ids: bool | None = None
        self.processor = PromptProcessor(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self._dropped = dropped_tensors(config)
        generation = None
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        self._eos_ids = end_of_turn_ids(generation, self.processor)
        self._banned = set(banned_ids(config, self.processor, self._eos_ids))

    def load_weights(self, folder: Path, digest: str) -> None:
        """Hold the weights of a model folder; nothing happens where the servers already hold that digest.

        Raises:
            InputError: the weights are incomplete, or those of another model; the servers then keep the old ones.
            ServerError: a server cannot be started, or takes no weights.
        """
        # A server that reads a bad folder dies of it.
        shapes = weight_shapes(folder)
        different = {name for name in shapes if shapes[name] != self._shapes.get(name)}
        different |= {name for name in self._shapes if name not in shapes and not self._dropped.search(name)}
        if different:
            raise InputError(
                f"weights in {folder} must be those of the model that the engine started with, but tensors differ in "
                f"name or shape: {', '.join(sorted(different)[:3])}; start another engine"
            )
        self._servers.hold(folder, digest)

    def close(self) -> None:
        """Stop the servers that were started for this engine."""
        self._servers.close()

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        temperature: float,
        max_new_tokens: int,
        advance: Advance,
        top_p: float = 1.0,
        top_k: int = 0,
        presence_penalty: float = 0.0,
    ) -> list[list[Response]]:
        """Give, per request, one response per seed, with the settings that `PolicyEngine.sample` explains.

        A request's responses are sampled together, from its first seed and their number; the same request gives the
        same responses on CPU. Special tokens but end-of-turn are banned. The log-probs are the model's own: at
        temperature 1, with nothing penalised, left out or banned.

        Raises:
            ServerError: the servers are lost, or a reply comes from other weights or holds a banned token.
            InputError: a server refuses a prompt, or counts its tokens otherwise than the processor.
        """
        settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens}
        if top_p < 1:
            settings["top_p"] = top_p
        if top_k > 0:
            settings["top_k"] = top_k
        if presence_penalty:
            settings["presence_penalty"] = presence_penalty
        works = []
        for request in requests:
            asked = self._ask(request.prompt)
            call = partial(self._sample, asked, request.seeds, settings)
            works.append(Work(asked.num_tokens + len(request.seeds) * max_new_tokens, call))
            self._require_room(asked.num_tokens + max_new_tokens)
        return self._servers.run(works, advance)

    def score(self, requests: Sequence[ReplayRequest], *, advance: Advance) -> list[list[ResponseScores]]:
        """Give, per request, the scores of each of its responses.

        Raises:
            ServerError: the servers are lost, or a reply comes from other weights or is not finite.
            InputError: a server refuses a prompt, or counts its tokens otherwise than the processor.
        """
        works = []
        for request in requests:
            asked = self._ask(request.prompt)
            cost = sum(asked.num_tokens + len(response) for response in request.responses)
            works.append(Work(cost, partial(self._score, asked, request.responses, request.top_k)))
            # A server that scores a prompt always samples a token after it.
            self._require_room(asked.num_tokens + max(map(len, request.responses)) + 1)
        if self._scores_given_ids is None and any(request.top_k == 0 for request in requests):
            (self._scores_given_ids,) = self._servers.run([Work(2, self._try_given_ids)], lambda _: None)
        return self._servers.run(works, advance)

    # --- sampling -----------------------------------------------------------------------------------------------

    async def _sample(
        self, asked: _Asked, seeds: Sequence[int], settings: dict[str, Any], client: VLLMClient
    ) -> list[Response]:
        sampling = {
            "n": len(seeds),
            "seed": seeds[0] % _MAX_SEED,
            **settings,
            "logprobs": 0,
            "stop_token_ids": list(self._eos_ids),
            "logit_bias": {str(token): _BAN for token in sorted(self._banned)},
        }
        reply = await client.generate(asked.token_ids, await asked.images(), sampling)
        self._require_same_prompt(reply, asked, (), client)
        choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != len(seeds):
            raise LostRequestError(f"{client.url} gave {len(choices)} responses of {len(seeds)}")
        return [self._response(choice, client) for choice in choices]

    def _response(self, choice: dict[str, Any], client: VLLMClient) -> Response:
        self._require_weights(choice, client)
        token_ids = tuple(choice["token_ids"])
        if choice["finish_reason"] not in ("stop", "length") or not token_ids:
            raise LostRequestError(f"{client.url} ended a response by {choice['finish_reason']!r}")
        if banned := self._banned & set(token_ids):
            raise ServerError(f"vLLM server {client.url} sampled token {min(banned)}, which is banned; report this")
        text = self.processor.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return Response(
            token_ids=token_ids,
            logprobs=_finite([entry["logprob"] for entry in choice["logprobs"]["content"]], len(token_ids), client),
            text=text.strip(),
            truncated=choice["finish_reason"] == "length",
            weights=choice["weight_versions"][0]["version"] if choice["weight_versions"] else None,
        )

    # --- replay -------------------------------------------------------------------------------------------------

    async def _score(
        self, asked: _Asked, responses: Sequence[tuple[int, ...]], top_k: int, client: VLLMClient
    ) -> list[ResponseScores]:
        images = await asked.images()
        salt = None
        if self._read_prefix_cache:
            # A salt of the prompt's own: what is cached under it is read for this prompt alone.
            content = repr((asked.token_ids, [image.digest for image in images]))
            salt = hashlib.sha256(content.encode()).hexdigest()
            await client.generate(asked.token_ids, images, {"max_tokens": 1, "temperature": 0}, cache_salt=salt)
        replay = partial(self._replay, asked, images, top_k, salt, client)
        # After the first request the server has the images; the others only name them.
        first, *others = responses
        return [await replay(first), *await together(replay(other) for other in others)]

    async def _replay(
        self,
        asked: _Asked,
        images: Sequence[EncodedImage],
        top_k: int,
        salt: str | None,
        client: VLLMClient,
        response: tuple[int, ...],
    ) -> ResponseScores:
        """Score one response by documented requests, unless the prefix cache may be read."""
        ask = partial(self._continue, asked, images, response, client)
        if salt is not None and (scores := await self._replay_cached(asked, response, top_k, salt, client, ask)):
            return scores
        if top_k == 0 and self._scores_given_ids:
            return await self._replay_given_ids(asked, response, client, ask)
        return _tail_scores(await ask({"prompt_logprobs": top_k}), response, top_k, client)

    async def _try_given_ids(self, client: VLLMClient) -> bool:
        """Ask, without an image, whether log-probs of given ids can be had: vLLM's newer runner has them.

        A refused request with an image would leave it in one of the server's caches and not in the other.
        """
        token = self._eos_ids[0]
        rows = {"prompt_logprob_token_ids": [[token]], "prompt_logprob_start": 0}
        try:
            await client.generate([token, token], [], {"max_tokens": 1, "temperature": 0, **rows})
        except RefusedRequestError as error:
            if "prompt_logprob_token_ids" not in str(error):
                raise
            return False
        return True

    async def _replay_given_ids(
        self, asked: _Asked, response: tuple[int, ...], client: VLLMClient, ask: _Ask
    ) -> ResponseScores:
        """Ask for the response's own tokens alone, in rows from the last token of the prompt on."""
        rows = {
            "prompt_logprob_token_ids": [[token] for token in response],
            "prompt_logprob_start": asked.num_tokens - 1,
        }
        reply = await ask(rows)
        content = io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"]))
        logprobs = np.load(content, allow_pickle=False)
        if logprobs.shape != (len(response), 1):
            raise ServerError(
                f"vLLM server {client.url} gave rows {logprobs.shape} for a response of {len(response)} tokens"
            )
        return _scores(reply, _finite(logprobs[:, 0].tolist(), len(response), client), [[] for _ in response], 0)

    async def _replay_cached(
        self, asked: _Asked, response: tuple[int, ...], top_k: int, salt: str, client: VLLMClient, ask: _Ask
    ) -> ResponseScores | None:
        """Read the prompt from the cache; None where what came is not to be trusted.

        Rows of cached positions are memory that nobody wrote. The response's rows are right as long as the prompt's
        last token was computed: it is what the first of them follows from.
        """
        extra = {"prompt_logprobs": top_k, "skip_reading_prefix_cache": False}
        try:
            reply = await ask(extra, cache_salt=salt)
            num_cached = _num_cached(reply)
            if num_cached is None or num_cached >= asked.num_tokens:
                return None
            return _tail_scores(reply, response, top_k, client)
        except (RefusedRequestError, LostRequestError):
            # Not every number that memory may hold can be written as JSON.
            return None

    async def _continue(
        self,
        asked: _Asked,
        images: Sequence[EncodedImage],
        response: tuple[int, ...],
        client: VLLMClient,
        extra: dict[str, Any],
        **more: Any,
    ) -> dict[str, Any]:
        sampling = {"max_tokens": 1, "temperature": 0, **extra}
        reply = await client.generate([*asked.token_ids, *response], images, sampling, **more)
        self._require_same_prompt(reply, asked, response, client)
        self._require_weights(reply["choices"][0], client)
        return reply

    # --- what is asked, and whether the answer is to it ---------------------------------------------------------

    def _require_room(self, num_tokens: int) -> None:
        longest = self._servers.max_model_len
        if longest is not None and num_tokens > longest:
            raise InputError(
                f"prompt and response must have at most the {longest} tokens that the vLLM server takes "
                f"(max_model_len), got {num_tokens}; start it with more, or lower data.max_prompt_tokens, or "
                "generation.max_new_tokens where a benchmark is asked"
            )

    def _ask(self, prompt: Prompt) -> _Asked:
        return _Asked(prompt, *self.processor.placeholders(prompt))

    def _require_same_prompt(
        self, reply: dict[str, Any], asked: _Asked, response: tuple[int, ...], client: VLLMClient
    ) -> None:
        """Refuse a reply whose prompt, images expanded, is not the one that the trainer will see."""
        found = reply["prompt_token_ids"]
        ranges = (reply.get("mm_placeholders") or {}).get("image", [])
        visual = {place for part in ranges for place in range(part["offset"], part["offset"] + part["length"])}
        text = [token for place, token in enumerate(found) if place not in visual]
        image_id = self.processor.image_id
        expected = [token for token in (*asked.token_ids, *response) if token != image_id]
        wrong = None
        if len(found) != asked.num_tokens + len(response) or len(ranges) != len(asked.prompt.images):
            wrong = (
                f"{asked.num_tokens} tokens with {len(asked.prompt.images)} images, but it sees "
                f"{len(found) - len(response)} with {len(ranges)}"
            )
        elif text != expected:
            place = next(place for place, pair in enumerate(zip(text, expected, strict=True)) if len(set(pair)) > 1)
            wrong = f"with token {expected[place]} as number {place} outside images, but it sees {text[place]}"
        if wrong is not None:
            raise InputError(
                f"vLLM server {client.url} must see a prompt as its processor does, {wrong}; start it on the same "
                "model folder, and without processor settings of its own"
            )

    def _require_weights(self, choice: dict[str, Any], client: VLLMClient) -> None:
        wanted = client.weights
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if wanted is not None and versions != {wanted}:
            raise ServerError(
                f"vLLM server {client.url} must answer with the weights {wanted}, but it names {sorted(versions)}; "
                "let no other run exchange its weights, and start this one again"
            )


def _num_cached(reply: dict[str, Any]) -> int | None:
    """Give how many tokens were read from the prefix cache; None where the server does not tell."""
    details = reply["usage"].get("prompt_tokens_details")
    return None if details is None else int(details.get("cached_tokens") or 0)


def _tail_scores(reply: dict[str, Any], response: tuple[int, ...], top_k: int, client: VLLMClient) -> ResponseScores:
    """Read the rows of a response's tokens: the last ones of the prompt that was sent."""
    rows = reply["prompt_logprobs"][-len(response) :]
    # All of them, for what is no number has no rank.
    values = [entry["logprob"] for row in rows for entry in row.values()]
    _finite(values, len(values), client)
    own = tuple(row[str(token)]["logprob"] for row, token in zip(rows, response, strict=True))
    top = []
    for row in rows:
        # A row also holds the response's own token, likely or not.
        ranked = sorted(((entry["logprob"], -int(token)) for token, entry in row.items()), reverse=True)[:top_k]
        top.append([(-token, logprob) for logprob, token in ranked])
    return _scores(reply, own, top, top_k)


def _scores(
    reply: dict[str, Any], own: tuple[float, ...], top: Sequence[Sequence[tuple[int, float]]], top_k: int
) -> ResponseScores:
    shape = (len(own), top_k)
    num_tokens = int(reply["usage"]["prompt_tokens"])
    return ResponseScores(
        logprobs=torch.tensor(own),
        topk_ids=torch.tensor([[token for token, _ in row] for row in top], dtype=torch.int64).reshape(shape),
        topk_logprobs=torch.tensor([[value for _, value in row] for row in top]).reshape(shape),
        num_tokens=num_tokens,
        num_computed_tokens=num_tokens - (_num_cached(reply) or 0),
    )


def _finite(logprobs: Sequence[float], number: int, client: VLLMClient) -> tuple[float, ...]:
    if len(logprobs) != number or not all(value is not None and math.isfinite(value) for value in logprobs):
        raise LostRequestError(f"{client.url} gave log-probs that are no numbers, or not {number} of them")
    return tuple(logprobs)
