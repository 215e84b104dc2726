"""A small program in place of an inference server, with faults by option; the standard library alone."""

import argparse
import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True, help="JSON of the ids of its processes and its memory")
    parser.add_argument("--bind-after", type=float, default=0.0)
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--exit", type=int, help="end at once with this code")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--child", choices=["same_group", "own_group"], help="a process that would outlive this one")
    parser.add_argument("--memory", action="store_true", help="shared memory and a semaphore that would outlive it")
    parser.add_argument("--map", type=Path, help="a file of others that it maps too")
    parser.add_argument("--map-mode", choices=["ACCESS_WRITE", "ACCESS_READ", "ACCESS_COPY"], default="ACCESS_WRITE")
    parser.add_argument("--retitle", action="store_true", help="do what setproctitle does to the environment")
    options = parser.parse_args()
    if options.exit is not None:
        print("so it cannot go on", file=sys.stderr)
        sys.exit(options.exit)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state: dict[str, Any] = {"program": os.getpid(), "marker": os.environ["VZERO_SERVER"]}
    if options.retitle and "SPT_NOENV" not in os.environ:
        _overwrite_environment()
    if options.memory:
        memory = SharedMemory(create=True, size=1 << 16)
        # Its tracker would unlink it where the program is killed.
        resource_tracker.unregister(f"/{memory.name}", "shared_memory")
        semaphore = multiprocessing.get_context("spawn").Lock()
        resource_tracker.unregister(semaphore._semlock.name, "semaphore")
        state["memory"] = [memory.name, f"sem.{semaphore._semlock.name.removeprefix('/')}"]
    mapped = _map(options.map, getattr(mmap, options.map_mode)) if options.map else None
    if options.child:
        child = [sys.executable, "-c", "import time; time.sleep(600)"]
        group = 0 if options.child == "own_group" else None
        state["child"] = subprocess.Popen(child, process_group=group).pid
    options.state.write_text(json.dumps(state))
    ready_at = time.monotonic() + options.ready_after
    time.sleep(options.bind_after)
    _serve(options.port, ready_at)
    del mapped


def _overwrite_environment() -> None:
    # Fields 50 and 51 of /proc/PID/stat; the title goes where the kernel had put arguments and environment.
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    with Path("/proc/self/mem").open("r+b", buffering=0) as own_memory:
        own_memory.seek(start)
        own_memory.write(bytes(end - start))


def _map(path: Path, access: int) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def _serve(port: int, ready_at: float) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" and time.monotonic() >= ready_at else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
