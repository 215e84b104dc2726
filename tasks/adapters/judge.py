"""A model behind OpenAI's chat interface that says whether an open answer is right (docs/SCORING.md)."""

import asyncio
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from tasks.adapters.formats import shown
from tasks.adapters.vllm_client import together
from tasks.config import JudgeServerConfig
from tasks.evaluation_config import JudgeConfig
from tasks.ports import Advance
from vzero_core.errors import ConfigError, VZeroError

_ATTEMPTS = 3
_LONGEST_WAIT = 8.0
"""Seconds between two attempts, at most."""
_LONGEST_PROBE = 10.0
"""Seconds in which a server that is there answers."""
_VERDICT = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)


class LostJudgeError(VZeroError, ConnectionError):
    """The judge's server does not answer any more; it may do so later."""


class JudgeRow(NamedTuple):
    """What the judge is asked: does the response mean the same as the answer to the question?"""

    question: str
    answer: str
    response: str


class Verdict(NamedTuple):
    """What the judge said.

    Attributes:
        correct: it said yes.
        problem: why it said neither yes nor no; the row then counts as wrong.
    """

    correct: bool
    problem: str | None = None


class _LostReplyError(Exception):
    """No reply came; another attempt may get one."""


class _RefusedError(Exception):
    """The server will not answer this question, however often it is asked."""


def check_judge(where: JudgeServerConfig) -> None:
    """Make sure that a judge can be asked, before anything else is done.

    Raises:
        ConfigError: its address is missing or unfit, or the environment variable with its key is empty.
    """
    url = where.url
    if url is None:
        raise ConfigError(
            "placement.judge.url must be the address of a server with /chat/completions where a benchmark has a "
            "judge, got none; set it, or leave the judge out"
        )
    if "@" in url:
        raise ConfigError(
            "placement.judge.url must hold no user name and no password, got an address with @; put the key into an "
            "environment variable and name that in api_key_variable"
        )
    if not re.match(r"https?://[^/]", url):
        raise ConfigError(f"placement.judge.url must be such as http://HOST:PORT/v1, got {url}; mend it")
    if where.api_key_variable is not None and not _api_key(where):
        raise ConfigError(
            f"environment variable {where.api_key_variable} must hold the API key of the judge at {url}; set it"
        )


def judge(config: JudgeConfig, where: JudgeServerConfig, rows: Sequence[JudgeRow], advance: Advance) -> list[Verdict]:
    """Ask the judge about each row and give its verdicts in the rows' order.

    Args:
        config: which model is asked, and how.
        where: its server.
        rows: what it is asked.
        advance: called with the number of rows just judged.

    Raises:
        ConfigError: the server cannot be asked so: no address, a wrong key, no such model.
        LostJudgeError: the server is gone, so that no row would be judged.
    """
    check_judge(where)
    return asyncio.run(_judge(config, where, rows, advance)) if rows else []


async def _judge(
    config: JudgeConfig, where: JudgeServerConfig, rows: Sequence[JudgeRow], advance: Advance
) -> list[Verdict]:
    key = _api_key(where)
    async with aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=aiohttp.ClientTimeout(total=where.request_timeout),
    ) as session:
        asked = _Judge(session, config, where)
        places = asyncio.Semaphore(where.max_requests)

        async def one(row: JudgeRow) -> Verdict:
            async with places:
                verdict = await asked.verdict(row)
            advance(1)
            return verdict

        return await together(one(row) for row in rows)


class _Judge:
    def __init__(self, session: aiohttp.ClientSession, config: JudgeConfig, where: JudgeServerConfig) -> None:
        self._session = session
        self._config = config
        self._where = where
        self._url = str(where.url).rstrip("/")

    async def verdict(self, row: JudgeRow) -> Verdict:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_LostReplyError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(max=_LONGEST_WAIT),
            reraise=True,
        )
        try:
            reply: str = await attempts(self._reply, _filled(self._config.template, row))
        except _LostReplyError as error:
            if not await self._is_there():
                raise LostJudgeError(
                    f"the judge at {self._where.url} must answer, but a question got no reply in {_ATTEMPTS} attempts "
                    f"({error}), and /models none either; start it and run again"
                ) from error
            return Verdict(False, str(error))
        except _RefusedError as error:
            return Verdict(False, str(error))
        if (match := _VERDICT.fullmatch(reply)) is None:
            return Verdict(False, f"the judge must reply yes or no, got {self._quoted(reply)!r}")
        return Verdict(match[1].casefold() == "yes")

    async def _reply(self, prompt: str) -> str:
        """Ask once.

        Raises:
            _LostReplyError: no reply came.
            _RefusedError: the server refuses this question.
            ConfigError: it refuses every question.
        """
        where = self._where
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self._config.max_new_tokens,
        }
        try:
            async with self._session.post(
                f"{self._url}/chat/completions", json=body, allow_redirects=False
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            raise _LostReplyError(f"the judge did not answer within {where.request_timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _LostReplyError(f"the judge is lost: {self._quoted(error)}") from error
        status = response.status
        said = self._quoted(content.decode(errors="replace"))
        if status in (401, 403):
            raise ConfigError(
                f"the judge at {where.url} must accept the API key, but it answered {status}; put the right one into "
                "the environment variable that placement.judge.api_key_variable names"
            )
        if status == 404:
            raise ConfigError(
                f"the judge at {where.url} must have /chat/completions and the model {self._config.model}, but it "
                f"answered 404 ({said}); mend placement.judge.url or the judge's model"
            )
        if status >= 500 or status in (408, 429):
            raise _LostReplyError(f"the judge answered {status}: {said}")
        if status != 200:
            raise _RefusedError(f"the judge refuses the question ({status}): {said}")
        try:
            reply = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise _LostReplyError(f"the judge answered something else than a chat completion: {said}") from error
        return reply if isinstance(reply, str) else ""

    async def _is_there(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=min(_LONGEST_PROBE, self._where.request_timeout))
        try:
            async with self._session.get(f"{self._url}/models", timeout=timeout, allow_redirects=False) as response:
                # A proxy answers 502 or 503 for a server that is gone.
                return response.status < 500
        except (aiohttp.ClientError, OSError):
            return False

    def _quoted(self, text: object) -> str:
        """Give what a server said for a message; it may have said the key."""
        key = _api_key(self._where)
        return shown(str(text).replace(key, "***") if key else text)


def _filled(template: str, row: JudgeRow) -> str:
    """Fill a template in one pass: what stands in a row is never taken for a place to fill."""
    return re.sub(r"\{(question|answer|response)\}", lambda place: str(getattr(row, place[1])), template)


def _api_key(where: JudgeServerConfig) -> str:
    return os.environ.get(where.api_key_variable, "").strip() if where.api_key_variable else ""
