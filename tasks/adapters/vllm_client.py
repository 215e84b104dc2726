"""One vLLM server's HTTP interface: the routes that are used of it, and what its errors mean (docs/VLLM.md)."""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from PIL import Image

from vzero_core.errors import InputError

T = TypeVar("T")

_LOADING = "loading"
"""Weight version of a server whose weights are being exchanged: no policy has it."""


class LostRequestError(Exception):
    """A request without a good reply; it may succeed on another server, or later."""


class RefusedRequestError(InputError):
    """A request that the server understood and will not answer, however often it is asked."""


@dataclass(frozen=True)
class EncodedImage:
    """An image on its way to a server.

    Attributes:
        digest: hash of `url`, under which a server remembers what it made of the image.
        url: the image as a PNG data URL.
    """

    digest: str
    url: str


def encode_image(image: Image.Image) -> EncodedImage:
    """Encode an image without loss."""
    stream = io.BytesIO()
    # The lowest compression: on the way between two programs time counts for more than size.
    image.save(stream, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(stream.getbuffer()).decode()
    return EncodedImage(digest=hashlib.sha256(url.encode()).hexdigest(), url=url)


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls side by side and give their results in order; the first error ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class VLLMClient:
    """Talks to one server; it belongs to one event loop, as its session does."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, served_name: str, weights: str | None, sent: set[str]
    ) -> None:
        """Set whom to talk to.

        Args:
            session: with time-outs and API key.
            url: http://HOST:PORT.
            served_name: the model's name there.
            weights: what replies must name as their weights; None where the server names none.
            sent: digests of the images that the server has been sent; it grows.
        """
        self._session = session
        self.url = url
        self.weights = weights
        self._served_name = served_name
        self._sent = sent

    async def generate(
        self, token_ids: Sequence[int], images: Sequence[EncodedImage], sampling: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Continue token ids, each image standing for one placeholder among them.

        An image that the server has been sent is named by its digest alone, until the server has forgotten it.

        Raises:
            LostRequestError: no good reply came.
            RefusedRequestError: the server refuses the request.
        """
        body = {
            "model": self._served_name,
            "token_ids": list(token_ids),
            "sampling_params": {"detokenize": False, **sampling},
            "return_token_ids": True,
            **more,
        }
        parts = [_part(image, image.digest in self._sent) for image in images]
        try:
            reply = await self._call("POST", "/inference/v1/generate", {**body, "content_parts": parts})
        except RefusedRequestError as error:
            if "Cache miss" not in str(error):
                raise
            parts = [_part(image, False) for image in images]
            reply = await self._call("POST", "/inference/v1/generate", {**body, "content_parts": parts})
        self._sent.update(image.digest for image in images)
        assert isinstance(reply, dict)
        return reply

    async def problem(self, timeout: float) -> str | None:
        """Say what is wrong where the server does not say within some seconds that it is well."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(timeout)) as response:
                return None if response.status == 200 else f"it answered {response.status} to /health"
        except TimeoutError:
            return f"no answer to /health within {timeout:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            return str(error)

    async def version(self) -> str:
        """Give vLLM's version."""
        return str((await self._call("GET", "/version"))["version"])

    async def models(self) -> dict[str, int | None]:
        """Give the served models by name, and how many tokens each takes."""
        return {
            str(model["id"]): model.get("max_model_len") for model in (await self._call("GET", "/v1/models"))["data"]
        }

    async def arithmetic(self) -> tuple[str, str | None] | None:
        """Give dtype and quantisation that the server computes with; None where it does not tell."""
        try:
            settings = (await self._call("GET", "/server_info?config_format=json"))["vllm_config"]["model_config"]
        except RefusedRequestError:
            return None
        return str(settings["dtype"]).removeprefix("torch."), settings["quantization"]

    async def weight_version(self) -> str | None:
        """Give the name of the weights that the server holds; None where it does not tell."""
        try:
            return str((await self._call("GET", "/weight_info"))["weight_version"])
        except RefusedRequestError:
            return None

    async def name_weights(self, digest: str) -> None:
        """Name the weights that the server holds; every reply says the name."""
        await self._call("POST", "/update_weight_version", {"new_version": digest})

    async def load_weights(self, folder: Path, digest: str) -> None:
        """Exchange the weights for those of a folder, which the server must see under the same path.

        Until all is done the weights have a name that no policy has: a server that stops in the middle is found out.
        """
        await self._call("POST", "/pause?mode=wait&clear_cache=true")
        await self.name_weights(_LOADING)
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        await self._call("POST", "/collective_rpc", reload)
        # What was made of images with the old weights must not meet the new ones.
        await self._call("POST", "/reset_mm_cache")
        await self._call("POST", "/reset_encoder_cache")
        self._sent.clear()
        await self._call("POST", "/resume")
        # The last: a server that has the name must not be one that still pauses.
        await self.name_weights(digest)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                content = await response.read()
        except TimeoutError as error:
            raise LostRequestError(f"{self.url} did not answer within request_timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise LostRequestError(f"{self.url} is lost: {error}") from error
        message = content[:500].decode(errors="replace")
        if response.status >= 500 or response.status in (408, 429):
            raise LostRequestError(f"{self.url} answered {response.status} to {path}: {message}")
        if response.status in (401, 403):
            raise InputError(
                f"vLLM server {self.url} must accept the API key, but it answered {response.status}; put the right "
                "one into the environment variable that api_key_variable names"
            )
        if response.status != 200:
            raise RefusedRequestError(f"vLLM server {self.url} refuses {path} ({response.status}): {message}")
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise LostRequestError(f"{self.url} answered something else than JSON to {path}: {message}") from error


def _part(image: EncodedImage, known: bool) -> dict[str, str | None]:
    return {"type": "image_url", "url": None if known else image.url, "uuid": image.digest}
