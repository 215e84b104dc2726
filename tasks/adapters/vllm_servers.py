"""The vLLM servers of one model: started or attached to, kept alive, given their weights, and fed by least load."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiohttp

from tasks.adapters.server_process import ServerError, ServerProcess
from tasks.adapters.vllm_client import LostRequestError, VLLMClient, together
from tasks.adapters.vllm_command import server_command, server_environment
from tasks.adapters.vllm_weights import reloadable
from tasks.config import ModelConfig, ServersConfig, VLLMEngine
from tasks.ports import Advance
from vzero_core.errors import InputError, VZeroError

T = TypeVar("T")
log = logging.getLogger("vzero.vllm")

MAX_ATTEMPTS = 4
"""How often a piece of work is given to servers before the run stops: it may itself be what ends them."""
MAX_RECOVERIES = 3
"""How often in a row, without a good reply between, a server is brought back."""
HEALTH_TIMEOUT = 10.0
"""Seconds in which a server that works answers to a question for its health."""
_UNNAMED = "default"
"""Weight version of a server to which nobody gave one."""


@dataclass(frozen=True)
class Work(Generic[T]):
    """What one server is to do as a whole.

    Attributes:
        num_tokens: what it costs, in tokens of prompts and responses.
        call: does it; it is called again, perhaps on another server, when its requests are lost.
    """

    num_tokens: int
    call: Callable[[VLLMClient], Awaitable[T]]


@dataclass
class _Replica:
    """A server and what is known of it.

    Attributes:
        number: among its like, from 0.
        url: http://HOST:PORT.
        process: None where the server was not started here.
        named: what its replies must name as their weights; None where it names none.
        max_model_len: tokens that it takes, prompt and response together.
        sent: digests of the images it has been sent.
        in_flight: tokens of the work that it does now.
        usable: False where it was given up.
        recovery: what brings it back now; until then it gets no work.
        recoveries: how often it was brought back since its last good reply.
        generation: changes when it was brought back.
    """

    number: int
    url: str
    process: ServerProcess | None
    named: str | None = None
    max_model_len: int | None = None
    sent: set[str] = field(default_factory=set)
    in_flight: int = 0
    usable: bool = True
    recovery: asyncio.Task[None] | None = None
    recoveries: int = 0
    generation: int = 0


class VLLMServers:
    """Servers that hold the same weights; which of them answers makes no difference."""

    def __init__(
        self,
        role: str,
        model: ModelConfig,
        servers: ServersConfig,
        *,
        exchangeable: bool,
        work_dir: Path,
        threads: int,
        track: Callable[[str, int], AbstractContextManager[Advance]],
    ) -> None:
        """Set how servers are got; none is started yet.

        Args:
            role: what the model is in the run, for names and messages.
            model: arithmetic and engine version.
            servers: where they are, or how they are started.
            exchangeable: the weights will be exchanged; else servers that run already are taken as they are.
            work_dir: local folder for logs.
            threads: CPU threads of a server without GPUs.
            track: shows progress, given a title and a total.

        Raises:
            InputError: the environment variable with the API key is not set.
        """
        assert isinstance(model.engine, VLLMEngine), "asked for servers of vLLM alone"
        self._role = role
        self._model = model
        self._engine = model.engine
        self._config = servers
        self._exchangeable = exchangeable
        self._work_dir = work_dir
        self._reload_dir = work_dir / "servers" / f"{role}-weights"
        self._threads = threads
        self._track = track
        self._folder = Path()
        self._digest = ""
        self._api_key = _api_key(servers)
        self._replicas: list[_Replica] = []
        self._changed: asyncio.Condition
        self._failure: VZeroError | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._closed = False

    @property
    def max_model_len(self) -> int | None:
        """Tokens that every server takes, prompt and response together; None where none of them says."""
        return min((replica.max_model_len for replica in self._replicas if replica.max_model_len), default=None)

    def hold(self, folder: Path, digest: str) -> None:
        """Have every server hold the weights of a folder; the first call starts or finds the servers.

        Raises:
            ServerError: a server does not start, cannot be reached, or takes no weights.
            InputError: a server is another one than configured.
        """
        if self._replicas and digest == self._digest:
            return
        first = not self._replicas
        self._folder, self._digest = folder, digest
        try:
            if not first:
                self._until_closed(self._exchange())
            elif self._config.urls:
                self._replicas = [
                    _Replica(number, url.rstrip("/"), None) for number, url in enumerate(self._config.urls)
                ]
                self._until_closed(self._attach())
            else:
                self._replicas = [self._prepare(number) for number in range(self._config.replicas)]
                self._until_closed(self._start())
        except BaseException:
            # Asked for again, it is done again.
            self._digest = ""
            if first:
                self._stop()
            raise

    def run(self, works: Sequence[Work[T]], advance: Advance) -> list[T]:
        """Do pieces of work, each on the server with the fewest tokens in flight, and give their results in order.

        Work on a server that is lost is done again elsewhere, or there once it is back.

        Raises:
            ServerError: no server is left, a piece of work failed `MAX_ATTEMPTS` times, or the servers were closed.
            InputError: a server refuses a request.
        """
        return self._until_closed(self._run(works, advance))

    def close(self) -> None:
        """Stop the servers that were started here; work that another thread still does on them fails."""
        self._closed = True
        if (running := self._running) is not None:
            loop, task = running
            # It may have ended by now.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        self._stop()

    def _until_closed(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call to its end, or until the servers are closed."""

        async def run() -> T:
            task = asyncio.current_task()
            assert task is not None, "asyncio.run makes one"
            self._running = asyncio.get_running_loop(), task
            if self._closed:
                call.close()
                raise asyncio.CancelledError
            return await call

        try:
            return asyncio.run(run())
        except asyncio.CancelledError as error:
            raise ServerError(f"vLLM servers of the {self._role} were stopped while they were at work") from error
        finally:
            self._running = None

    def _stop(self) -> None:
        for replica in self._replicas:
            if replica.process is not None:
                replica.process.stop()
        self._replicas = []

    # --- start, attach, exchange --------------------------------------------------------------------------------

    def _prepare(self, number: int) -> _Replica:
        process = ServerProcess(
            self._role if self._config.replicas == 1 else f"{self._role}-{number}",
            lambda port: server_command(self._folder, self._model, self._config, port),
            environment=server_environment(self._config, number, self._threads, self._api_key or ""),
            work_dir=self._work_dir,
            start_timeout=self._config.start_timeout,
        )
        return _Replica(number, "", process)

    async def _start(self) -> None:
        title = f"starting vLLM: {self._role}"
        shown = 0
        with self._track(title, int(self._config.start_timeout)) as advance:

            def waiting(seconds: float) -> None:
                nonlocal shown
                advance(max(0, int(seconds) - shown))
                shown = max(shown, int(seconds))

            await together(self._launch(replica, waiting) for replica in self._replicas)

    async def _launch(self, replica: _Replica, waiting: Callable[[float], None]) -> None:
        """Start a replica's process on the weights that are wanted now."""
        assert replica.process is not None, "only servers of our own are launched"
        try:
            await asyncio.to_thread(replica.process.start, waiting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled; without its process it ends at once.
            replica.process.stop()
            raise
        replica.url = replica.process.url
        replica.sent.clear()
        async with self._client(replica) as client:
            try:
                await self._require_configured(replica, client)
                await client.name_weights(self._digest)
                replica.named = self._digest
            except LostRequestError as error:
                raise ServerError(f"vLLM server is lost as soon as it is started: {error}") from error

    async def _attach(self) -> None:
        with self._track(f"attaching to vLLM: {self._role}", len(self._replicas)) as advance:
            await together(self._attach_to(replica, advance) for replica in self._replicas)

    async def _attach_to(self, replica: _Replica, advance: Advance) -> None:
        async with self._client(replica) as client:
            if problem := await self._wait_for(client, self._config.start_timeout):
                raise ServerError(
                    f"vLLM server {replica.url} must answer, but within {self._config.start_timeout:.0f} s it did not: "
                    f"{problem}; start it, or correct placement.{self._role}_servers.urls"
                )
            try:
                await self._require_configured(replica, client)
                await self._take_over(replica, client)
            except LostRequestError as error:
                raise ServerError(f"vLLM server is lost while it is attached to: {error}") from error
        advance(1)

    async def _take_over(self, replica: _Replica, client: VLLMClient) -> None:
        """Bring the weights of a server that was not started here to those that are wanted, or refuse it."""
        version = await client.weight_version()
        if self._exchangeable:
            if version is None:
                raise InputError(
                    f"vLLM server {client.url} must let its weights be exchanged, but it has no such route; "
                    "start it with VLLM_SERVER_DEV_MODE=1"
                )
            # Of its own: another server may be given weights at the same time.
            copy = self._reload_dir.with_name(f"{self._reload_dir.name}-{replica.number}")
            with reloadable(self._folder, copy) as folder:
                await client.load_weights(folder, self._digest)
            replica.named = self._digest
        elif version in (None, _UNNAMED):
            log.warning(
                "%s does not name its weights: they are taken for those of %s; name them by POST "
                '/update_weight_version with {"new_version": "%s"}',
                client.url,
                self._model.path,
                self._digest,
            )
            replica.named = version
        elif version != self._digest:
            raise InputError(
                f"vLLM server {client.url} must hold the weights {self._digest} of {self._model.path}, but it names "
                f"{version}; start it with the right model"
            )
        else:
            replica.named = version

    async def _require_configured(self, replica: _Replica, client: VLLMClient) -> None:
        if (version := await client.version()) != self._engine.version:
            raise InputError(
                f"vLLM server {client.url} must be version {self._engine.version} ({self._role}.engine.version), got "
                f"{version}; change one of them: what is computed is named by it"
            )
        models = await client.models()
        if self._config.served_name not in models:
            raise InputError(
                f"vLLM server {client.url} must serve {self._config.served_name!r} "
                f"(placement.{self._role}_servers.served_name), got {sorted(models)}; start it with --served-model-name"
            )
        replica.max_model_len = models[self._config.served_name]
        # One of our own was given both on its command line.
        if replica.process is None and (computes := await client.arithmetic()) is not None:
            wanted = (self._model.dtype, self._engine.quantization)
            if computes[0] != wanted[0] or (wanted[1] is not None and computes[1] != wanted[1]):
                raise InputError(
                    f"vLLM server {client.url} must compute in {wanted[0]} with quantization {wanted[1]} "
                    f"({self._role}.dtype, {self._role}.engine.quantization), got {computes[0]} with {computes[1]}; "
                    "start it with --dtype and --quantization accordingly"
                )

    async def _exchange(self) -> None:
        # A server of another's that was given up is looked at when there is work, while others are left.
        kept = [replica for replica in self._replicas if replica.usable or replica.process is not None]
        replicas = kept or self._replicas
        for replica in self._replicas:
            replica.named = self._digest
        with reloadable(self._folder, self._reload_dir) as folder:
            await together(self._exchange_on(replica, folder) for replica in replicas)
        if not any(replica.usable for replica in replicas):
            raise ServerError(
                f"no vLLM server of the {self._role} can be given new weights; see the warnings before this, and the "
                f"logs in {self._work_dir / 'servers'}"
            )

    async def _exchange_on(self, replica: _Replica, folder: Path) -> None:
        try:
            async with self._client(replica) as client:
                await client.load_weights(folder, self._digest)
            replica.usable = True
        except LostRequestError as error:
            log.warning("weights cannot be exchanged: %s", error)
            replica.usable = await self._bring_back(replica, self._config.start_timeout)

    # --- work ---------------------------------------------------------------------------------------------------

    async def _run(self, works: Sequence[Work[T]], advance: Advance) -> list[T]:
        self._changed = asyncio.Condition()
        self._failure = None
        for replica in self._replicas:
            replica.recoveries, replica.in_flight = 0, 0
        await together(self._look_again(replica) for replica in self._replicas if not replica.usable)
        if not any(replica.usable for replica in self._replicas):
            raise ServerError(f"vLLM: no server of the {self._role} is left; start one of {self._config.urls} again")
        try:
            async with self._session() as session:
                return await together(self._do(work, session, advance) for work in works)
        finally:
            # All is done without them; the next run looks at them again.
            recoveries = [replica.recovery for replica in self._replicas if replica.recovery is not None]
            for recovery in recoveries:
                recovery.cancel()
            await asyncio.gather(*recoveries, return_exceptions=True)

    async def _look_again(self, replica: _Replica) -> None:
        """Use a server again that was given up: one of our own is started by the first request that it loses."""
        replica.usable = replica.process is not None or await self._bring_back(replica, 0.0)

    async def _do(self, work: Work[T], session: aiohttp.ClientSession, advance: Advance) -> T:
        lost_on: _Replica | None = None
        for attempt in range(1, MAX_ATTEMPTS + 1):
            replica = await self._take(work.num_tokens, lost_on)
            generation = replica.generation
            try:
                result = await work.call(self._client_of(session, replica))
            except (KeyError, IndexError, TypeError) as error:
                raise ServerError(
                    f"vLLM server {replica.url} must answer as vLLM 0.32 does, but its reply cannot be read "
                    f"({type(error).__name__}: {error}); use a version that is tested"
                ) from error
            except LostRequestError as error:
                lost_on = replica
                if attempt == MAX_ATTEMPTS:
                    raise ServerError(
                        f"vLLM: the same requests were lost {MAX_ATTEMPTS} times, the last time because {error}; "
                        f"see the logs in {self._work_dir / 'servers'}, and start the run again"
                    ) from error
                # What was lost before the server came back says nothing of it now.
                if generation == replica.generation:
                    self._suspect(replica, error)
            else:
                replica.recoveries = 0
                advance(1)
                return result
            finally:
                await self._give_back(replica, work.num_tokens)
        raise AssertionError("the last attempt returns or raises")

    async def _take(self, num_tokens: int, lost_on: _Replica | None) -> _Replica:
        """Wait for a server with room, another one than work was lost on, and give that with the fewest tokens."""

        def free() -> list[_Replica]:
            limit = self._config.max_tokens_in_flight
            usable = [replica for replica in self._replicas if replica.usable]
            others = [replica for replica in usable if replica is not lost_on]
            # What is larger than the limit has a server for itself.
            return [
                replica
                for replica in others or usable
                if replica.recovery is None and (replica.in_flight == 0 or replica.in_flight + num_tokens <= limit)
            ]

        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or bool(free()))
            if self._failure is not None:
                raise self._failure
            replica = min(free(), key=lambda replica: replica.in_flight)
            replica.in_flight += num_tokens
            return replica

    async def _give_back(self, replica: _Replica, num_tokens: int) -> None:
        async with self._changed:
            replica.in_flight -= num_tokens
            self._changed.notify_all()

    def _suspect(self, replica: _Replica, error: LostRequestError) -> None:
        """Have a server looked at beside the work, which goes on elsewhere; the first lost request has it done."""
        if replica.recovery is None and replica.usable:
            # Said once for all that was lost with it.
            log.warning("%s; what it was asked is asked again", error)
            replica.recovery = asyncio.create_task(self._recover(replica, error))

    async def _recover(self, replica: _Replica, error: LostRequestError) -> None:
        failure: VZeroError | None = None
        replica.recoveries += 1
        try:
            replica.usable = replica.recoveries <= MAX_RECOVERIES and await self._bring_back(
                replica, self._config.start_timeout
            )
        except VZeroError as refusal:
            # It came back as another server than configured.
            failure = refusal
        except asyncio.CancelledError:
            # Another's server is not waited for where work can do without it.
            replica.usable = replica.process is not None
            raise
        finally:
            replica.recovery = None
            replica.generation += 1
        async with self._changed:
            if failure is None and not any(other.usable for other in self._replicas):
                failure = ServerError(f"vLLM: no server of the {self._role} is left; the last one: {error}")
            self._failure = self._failure or failure
            self._changed.notify_all()

    async def _bring_back(self, replica: _Replica, patience: float) -> bool:
        """Tell whether a server works with the right weights, after what can be done for it was done.

        Args:
            replica: a server of our own that hangs or is lost is started anew.
            patience: seconds in which another's server must come back.
        """
        async with self._client(replica) as client:
            try:
                if replica.process is None:
                    if problem := await self._wait_for(client, patience):
                        if patience > 0:
                            log.warning("%s is given up: %s", client.url, problem)
                        return False
                    await self._require_configured(replica, client)
                    if await client.weight_version() != replica.named:
                        await self._take_over(replica, client)
                    return True
                alive = replica.process.is_running() and await client.problem(HEALTH_TIMEOUT) is None
                if alive and await client.weight_version() == replica.named and replica.recoveries <= 1:
                    return True
            except LostRequestError as error:
                log.warning("%s", error)
                if replica.process is None:
                    return False
        if not replica.process.is_running():
            log.warning("%s", replica.process.lost())
        log.warning("the vLLM server of the %s is started anew", self._role)
        try:
            await asyncio.to_thread(replica.process.stop)
            await self._launch(replica, lambda _: None)
        except ServerError as error:
            log.warning("%s", error)
            return False
        return True

    async def _wait_for(self, client: VLLMClient, patience: float) -> str | None:
        """Wait until a server answers; give what was wrong at the last try, None where it answers."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        problem = await client.problem(HEALTH_TIMEOUT)
        if problem is not None and patience > 0:
            log.warning("waiting up to %.0f s for the vLLM server %s: %s", patience, client.url, problem)
        while problem is not None and loop.time() < deadline:
            await asyncio.sleep(1.0)
            problem = await client.problem(HEALTH_TIMEOUT)
        return problem

    # --- connections --------------------------------------------------------------------------------------------

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._config.request_timeout, sock_connect=HEALTH_TIMEOUT),
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
        )

    @asynccontextmanager
    async def _client(self, replica: _Replica) -> AsyncIterator[VLLMClient]:
        async with self._session() as session:
            yield self._client_of(session, replica)

    def _client_of(self, session: aiohttp.ClientSession, replica: _Replica) -> VLLMClient:
        return VLLMClient(session, replica.url, self._config.served_name, replica.named, replica.sent)


def _api_key(servers: ServersConfig) -> str | None:
    if not servers.urls:
        # Of one run, so that nobody else on this machine sends requests to its servers by mistake.
        return secrets.token_urlsafe(32)
    if servers.api_key_variable is None:
        return None
    key = os.environ.get(servers.api_key_variable, "").strip()
    if not key:
        raise InputError(
            f"environment variable {servers.api_key_variable} must hold the API key of {servers.urls[0]}; set it"
        )
    return key
