"""A server in place of a judge's: OpenAI's /v1/chat/completions on loopback, with faults on request."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Self

from aiohttp import web


class JudgeStandIn:
    """A server on a port of 127.0.0.1, in a thread of its own."""

    def __init__(
        self,
        reply: Callable[[str, int], str | int | dict[str, Any]],
        *,
        api_key: str | None = None,
        models_status: int = 200,
    ) -> None:
        """Set how it answers.

        Args:
            reply: from a prompt, and how often it was asked before, gives the message's text; or a status to fail
                with; or a whole body; or `<cut>`, `<hang>`, `<page>` for a cut connection, no reply, a proxy's page;
                or `<die>` for a cut connection, as every later one is.
            api_key: that it asks for.
            models_status: answers /models.
        """
        self._reply = reply
        self._api_key = api_key
        self._models_status = models_status
        self._dead = False
        self.asked: list[dict[str, Any]] = []
        """Bodies of the requests that came."""
        self.most_requests = 0
        self._num_open = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30), "it starts at once"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _work(self, ready: threading.Event) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._handle)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True, access_log=None)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.port = runner.addresses[0][1]
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return _cut(request) if self._dead else web.json_response({"data": []}, status=self._models_status)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        given = request.headers.get("Authorization")
        if self._api_key is not None and given != f"Bearer {self._api_key}":
            return web.json_response({"error": f"Incorrect API key provided: {given}"}, status=401)
        prompt = body["messages"][0]["content"]
        before = sum(other["messages"][0]["content"] == prompt for other in self.asked)
        self.asked.append(body)
        self._num_open += 1
        self.most_requests = max(self.most_requests, self._num_open)
        try:
            # So that others come meanwhile.
            await asyncio.sleep(0.02)
            return await self._answer(request, self._reply(prompt, before))
        finally:
            self._num_open -= 1

    async def _answer(self, request: web.Request, reply: str | int | dict[str, Any]) -> web.StreamResponse:
        match "<cut>" if self._dead else reply:
            case int():
                return web.json_response({"error": {"message": f"so it goes, {self._api_key}"}}, status=reply)
            case dict():
                return web.json_response(reply)
            case "<cut>":
                return _cut(request)
            case "<die>":
                self._dead = True
                return _cut(request)
            case "<hang>":
                await asyncio.sleep(3600)
            case "<page>":
                return web.Response(text="<html>a proxy's page</html>")
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": reply}}]})


def _cut(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()
