"""The pipeline as a service on this machine: `make serve`, or `python -m flows.serve [--config my.toml] [--port 4200]`.

Prefect's server, a worker for each work pool, the deployments, and the store's files for the dashboard's links; all on
127.0.0.1, and all gone when this ends. A run that was going then goes on at the next start.
"""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Scheduled

from flows.config import LAPTOP, PROJECT, RunConfig, load_config
from flows.server import OwnServer, ServerError, is_free, own_server
from vzero_core.errors import VZeroError

HOME = PROJECT / ".vzero" / "prefect"
PORT = 4200
"""Prefect's usual one; the store's files are at the next."""
_RESTART = timedelta(minutes=1)
"""Time in which a crashed run is started again by an automation, also over a restart of the server."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(config_path: Path | None, port: int) -> None:
    """Start all, and wait until it is stopped.

    Args:
        config_path: TOML configuration that the deployments get; None: the laptop's.
        port: of the dashboard; the store's files are at the next one.

    Raises:
        ServerError: something cannot be started, or has ended.
    """
    config = load_config(config_path) if config_path else LAPTOP
    store = _local_store(config)
    with ExitStack() as stack:
        say("starting Prefect's server")
        server = stack.enter_context(own_server(HOME, port))
        started = datetime.now(UTC)
        files = stack.enter_context(_files(store, port + 1)) if store else None
        say("registering deployments")
        _deploy(server, config_path, files)
        _go_on(started)
        stack.callback(_end_workers, server)
        workers = {f"worker-{pool}": _start_worker(server, pool) for pool in _pools()}
        _explain(server, files)
        stack.callback(say, "stopping")
        while True:
            for name, process in {"server": server.process, **workers}.items():
                if process.poll() is not None:
                    log = HOME / f"{name}.log"
                    raise ServerError(f"{name} must keep running, but it ended with {process.returncode}; see {log}")
            time.sleep(0.5)


def say(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def _local_store(config: RunConfig) -> Path | None:
    """Give the folder whose files a browser cannot open otherwise, if there is one."""
    url = config.store.url.removeprefix("file://")
    return None if "://" in url or config.store.web_url else PROJECT / url


def _pools() -> list[str]:
    pools = yaml.safe_load((PROJECT / "deployments" / "work-pools.yaml").read_text(encoding="utf-8"))
    return [pool["name"] for pool in pools["work_pools"]]


def _deploy(server: OwnServer, config_path: Path | None, files: str | None) -> None:
    # A process of its own: it imports all that the flows do, which this one can do without for days.
    command = [sys.executable, "-m", "flows.deploy"]
    command += ["--config", str(config_path.resolve())] if config_path else []
    command += ["--web-url", files] if files else []
    done = subprocess.run(command, cwd=PROJECT, env=server.environment, capture_output=True, text=True, check=False)
    (HOME / "deploy.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise ServerError(f"deployments must be registered, got:\n{(done.stderr or done.stdout).strip()}")


def _start_worker(server: OwnServer, pool: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", f"make serve, {pool}"]
    environment = {**server.environment, "PREFECT_WORKER_QUERY_SECONDS": "2"}
    with (HOME / f"worker-{pool}.log").open("w") as log:
        return subprocess.Popen(
            # Ctrl-C is for this process, which ends the others.
            command,
            cwd=PROJECT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end_workers(server: OwnServer) -> None:
    since = datetime.now(UTC)
    server.end_users()
    if server.process.poll() is None:
        _go_on(since)


def _go_on(since: datetime) -> None:
    """Have runs go on that were ended with the service.

    Args:
        since: what counts as crashed from then on was ended so too, for there was no worker.
    """
    going = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        # Each by itself: the server gives no more than 200, and what crashed long ago stays.
        for run in [*_in_states(client, going), *_in_states(client, [StateType.CRASHED])]:
            assert run.state is not None, "they were found by their states"
            if run.state.is_cancelling():
                client.set_flow_run_state(run.id, Cancelled(message="Ended with the service."), force=True)
            elif not run.state.is_crashed() or run.state.timestamp > since or _was_left(run, since):
                message = "The service was stopped while this ran; it goes on with the service."
                client.set_flow_run_state(run.id, Scheduled(message=message), force=True)


def _in_states(client: SyncPrefectClient, types: list[StateType]) -> list[FlowRun]:
    """Give the service's runs that are in one of some states, the last ones first."""
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=_pools())),
        sort=FlowRunSort.START_TIME_DESC,
    )


def _was_left(run: FlowRun, since: datetime) -> bool:
    """Tell whether a crashed run is one that the automation would have started again, had its server kept running."""
    assert run.state is not None, "it has crashed"
    return run.run_count == 1 and run.state.timestamp < since - _RESTART


class _StoreFiles(SimpleHTTPRequestHandler):
    """The files of one folder: no listings, nothing outside it, nobody else's pages as a way in."""

    def send_head(self) -> Any:
        """Send what comes before a file's content, or refuse it."""
        folder = Path(self.directory).resolve()
        file = Path(self.translate_path(self.path)).resolve()
        # Another name is a page's elsewhere that was given this machine's address.
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif not file.is_relative_to(folder) or not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            return super().send_head()
        return None

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is looked at is nobody's business."""


@contextmanager
def _files(folder: Path, port: int) -> Iterator[str]:
    """Serve the files of a folder on 127.0.0.1, to read; give their address."""
    if not is_free(port):
        raise ServerError(
            f"port {port} must be free, for the store's files, but a program listens there; stop it, or choose others: "
            "make serve PORT=4300"
        )
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(_StoreFiles, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        server.server_close()


def _explain(server: OwnServer, files: str | None) -> None:
    say(f"dashboard: {server.url.removesuffix('/api')}")
    if files:
        say(f"files:     {files}, for the dashboard's links")
    say(f"logs:      {HOME}")
    say("in another terminal:")
    say(f"  cd {PROJECT}")
    say(f"  export PREFECT_API_URL={server.url}")
    say(f"  {Path(sys.executable).with_name('prefect')} deployment run vzero/full-pipeline --watch")
    say("Ctrl-C stops all of it")


def _interrupt(*_: object) -> None:
    # Once: who is impatient would leave half of it running.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Serve from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Run the pipeline as a service.")
    parser.add_argument("--config", type=Path, help="TOML configuration of the deployments; without it the laptop's")
    parser.add_argument("--port", type=int, default=PORT, help="of the dashboard; files at the next (%(default)s)")
    options = parser.parse_args(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        serve(options.config, options.port)
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; a run that was going goes on at the next start", file=sys.stderr)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
