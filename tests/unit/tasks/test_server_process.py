"""A server program ends with its owner, in whatever way that ends; nothing of it stays, and nothing of others goes."""

import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import stand_in_server

from tasks.adapters.process_guard import find_process, session_members
from tasks.adapters.server_process import ServerError, ServerProcess, sweep

PROGRAM = [sys.executable, stand_in_server.__file__]
PATIENCE = 30.0
"""Seconds until a test gives up; all it waits for comes in two or three."""


class Stand:
    """One stand-in server: its owner's handle on it, and what it says of itself."""

    def __init__(self, folder: Path, *options: str, start_timeout: float = PATIENCE, **environment: str) -> None:
        self.work_dir = folder
        self.state_file = folder / "state.json"
        self.ports: list[int] = []
        self.options = options
        self.waited: list[float] = []
        self.server = ServerProcess(
            "student", self.command, environment=environment, work_dir=folder, start_timeout=start_timeout
        )

    def command(self, port: int) -> list[str]:
        self.ports.append(port)
        return [*PROGRAM, f"--port={port}", f"--state={self.state_file}", *self.options]

    def start(self) -> None:
        self.server.start(self.waited.append)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.state_file.read_text())
        return state

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.work_dir)

    @property
    def log(self) -> str:
        return (self.work_dir / "servers" / "student.log").read_text()


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Whatever a test proves or fails to, nothing of it is left to the next one."""
    yield
    left = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and works_in(path, tmp_path)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if (tmp_path / "state.json").exists():
        for name in read_state(tmp_path).get("memory", []):
            memory(name).unlink(missing_ok=True)


def works_in(process: Path, folder: Path) -> bool:
    try:
        return str(folder).encode() in (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    made: list[Stand] = []

    def make(*options: str, **others: Any) -> Stand:
        made.append(Stand(tmp_path, *options, **others))
        return made[-1]

    yield make
    for one in made:
        one.server.stop()


def read_record(work_dir: Path) -> dict[str, Any]:
    (path,) = records(work_dir)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def records(work_dir: Path) -> list[Path]:
    return list((work_dir / "servers").glob("*.json"))


def lives(pid: int) -> bool:
    return find_process(pid) is not None


def memory(name: str) -> Path:
    return Path("/dev/shm") / name


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it must come true"
        time.sleep(0.05)


def all_gone(state: dict[str, Any], work_dir: Path) -> bool:
    processes = any(lives(state[which]) for which in ("program", "child"))
    return not processes and not any(memory(name).exists() for name in state["memory"]) and not records(work_dir)


def wait_for_memory_in_record(work_dir: Path, names: list[str]) -> None:
    wait_until(lambda: {str(memory(name)) for name in names} == set(read_record(work_dir)["shared_memory"]))


# --- start and stop -----------------------------------------------------------------------------------------------


def test_a_server_answers_from_start_to_stop(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--child=same_group", "--memory")
    assert not one.server.is_running()
    one.start()
    assert one.server.is_running()
    assert one.server.url == f"http://127.0.0.1:{one.ports[0]}"
    with urllib.request.urlopen(f"{one.server.url}/health") as reply:
        assert reply.status == 200
    state = one.state
    assert lives(state["program"])
    assert lives(state["child"])
    assert all(memory(name).exists() for name in state["memory"])
    # What tells the guard to stop is not the program's to read.
    assert os.readlink(f"/proc/{state['program']}/fd/0") == "/dev/null"
    one.server.stop()
    assert not one.server.is_running()
    assert all_gone(state, tmp_path)
    one.server.stop()


def test_a_stopped_server_starts_again(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.start()
    first = one.state["program"]
    one.start()
    second = one.state["program"]
    assert not lives(first)
    assert lives(second)
    assert one.server.is_running()
    assert one.log.count(str(one.state_file)) == 2


def test_a_slow_start_is_told_every_second(stand: Callable[..., Stand]) -> None:
    one = stand("--ready-after=2.6")
    began = time.monotonic()
    one.start()
    assert one.waited[-1] <= time.monotonic() - began
    assert one.server.is_running()
    assert len(one.waited) >= 2
    assert all(later - earlier >= 1 for earlier, later in zip(one.waited, one.waited[1:], strict=False))
    assert one.waited[0] >= 1


def test_one_that_is_never_healthy_is_ended(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--ready-after=600", "--child=same_group", "--memory", start_timeout=1.5)
    with pytest.raises(ServerError, match=r"student server must be healthy within 2 s.*student\.log") as error:
        one.start()
    assert "raise the time-out" in str(error.value)
    assert not one.server.is_running()
    assert all_gone(one.state, tmp_path)


def test_one_that_ends_at_once_says_why(stand: Callable[..., Stand], tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "student.log").write_text("of an earlier start: address already in use\n")
    one = stand("--exit=3")
    with pytest.raises(
        ServerError, match=r"it ended with code 3; see .*student\.log, which ends:\nso it cannot go on$"
    ):
        one.start()
    assert one.log.startswith("of an earlier start")
    assert len(one.ports) == 1
    assert not records(tmp_path)


def test_the_error_ends_with_the_last_lines_of_the_log(tmp_path: Path) -> None:
    lines = "import sys; [print('line', number) for number in range(50)]; sys.exit(1)"
    server = ServerProcess(
        "student", lambda _: [sys.executable, "-c", lines], environment={}, work_dir=tmp_path, start_timeout=PATIENCE
    )
    with pytest.raises(ServerError) as error:
        server.start(lambda _: None)
    assert str(error.value).splitlines()[1:] == [f"line {number}" for number in range(30, 50)]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    server = ServerProcess("student", lambda _: [missing], environment={}, work_dir=tmp_path, start_timeout=PATIENCE)
    with pytest.raises(ServerError, match=rf"could not start it.*\n.*No such file or directory: '{missing}'"):
        server.start(lambda _: None)
    assert not records(tmp_path)


def test_an_interrupted_wait_leaves_nothing(stand: Callable[..., Stand], tmp_path: Path) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    one = stand("--ready-after=600", "--child=same_group", "--memory")
    with pytest.raises(KeyboardInterrupt):
        one.server.start(interrupt)
    assert all_gone(one.state, tmp_path)


def test_a_start_ends_when_another_thread_stops_it(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--ready-after=600", "--child=same_group", "--memory")
    with ThreadPoolExecutor(1) as executor:
        start = executor.submit(one.start)
        wait_until(lambda: bool(one.waited))
        one.server.stop()
        assert all_gone(one.state, tmp_path)
        with pytest.raises(ServerError, match="was stopped while it was started"):
            start.result(PATIENCE)
    assert all_gone(one.state, tmp_path)


def test_a_start_after_a_stop_is_none_of_the_stopped_ones_business(stand: Callable[..., Stand]) -> None:
    one = stand("--ready-after=600")
    with ThreadPoolExecutor(1) as executor:
        start = executor.submit(one.start)
        wait_until(lambda: bool(one.waited))
        one.server.stop()
        one.options = ()
        one.start()
        with pytest.raises(ServerError, match="was stopped while it was started"):
            start.result(PATIENCE)
    assert one.server.is_running()


def test_a_stop_between_two_ports_holds(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand()
    with socket.socket() as other:

        def command(port: int) -> list[str]:
            if one.ports:
                server.stop()
            else:
                other.bind(("127.0.0.1", port))
            return one.command(port)

        server = ServerProcess("student", command, environment={}, work_dir=tmp_path, start_timeout=PATIENCE)
        with pytest.raises(ServerError, match="was stopped while it was started"):
            server.start(lambda _: None)
    assert len(one.ports) == 2
    assert not server.is_running()
    assert not records(tmp_path)


def test_a_taken_port_is_replaced(stand: Callable[..., Stand]) -> None:
    with socket.socket() as other:

        def take_first(port: int) -> list[str]:
            if not one.ports:
                other.bind(("127.0.0.1", port))
                other.listen()
            return one.command(port)

        one = stand()
        one.server = ServerProcess("student", take_first, environment={}, work_dir=one.work_dir, start_timeout=PATIENCE)
        one.start()
        assert len(one.ports) == 2
        assert one.server.url.endswith(f":{one.ports[1]}")
        assert "[Errno 98]" in one.log
        one.server.stop()


def test_ports_are_tried_three_times(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand()
    others: list[socket.socket] = []

    def take_each(port: int) -> list[str]:
        others.append(socket.socket())
        others[-1].bind(("127.0.0.1", port))
        return one.command(port)

    server = ServerProcess("student", take_each, environment={}, work_dir=tmp_path, start_timeout=PATIENCE)
    with pytest.raises(ServerError, match=r"(?s)ended with code 1.*Address already in use"):
        server.start(lambda _: None)
    for other in others:
        other.close()
    assert len(others) == 3
    assert not records(tmp_path)


def test_another_server_on_the_port_is_not_taken_for_ours(stand: Callable[..., Stand]) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    others: list[HTTPServer] = []

    def take_first(port: int) -> list[str]:
        if not others:
            others.append(HTTPServer(("127.0.0.1", port), Healthy))
            threading.Thread(target=others[0].serve_forever, daemon=True).start()
        return one.command(port)

    one = stand("--bind-after=0.7")
    one.server = ServerProcess("student", take_first, environment={}, work_dir=one.work_dir, start_timeout=PATIENCE)
    one.start()
    assert one.server.url.endswith(f":{one.ports[1]}")
    others[0].shutdown()
    others[0].server_close()
    one.server.stop()


def test_secrets_are_written_nowhere(stand: Callable[..., Stand], tmp_path: Path) -> None:
    secret = f"secret-{uuid.uuid4().hex}"
    one = stand(start_timeout=PATIENCE, API_KEY=secret)
    one.start()
    # It was given, though.
    assert secret in Path(f"/proc/{one.state['program']}/environ").read_text()
    assert one.record["command"][:2] == PROGRAM
    one.server.stop()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "servers" / "student.log" in files
    assert not any(secret in path.read_text() for path in files)


def test_a_process_with_many_open_files_has_servers_too(stand: Callable[..., Stand]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2048), hard), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1024):
            stack.enter_context(open(os.devnull))
        one = stand()
        one.start()
        assert one.server.is_running()
        one.server.stop()


def test_no_thread_and_no_descriptor_is_left(stand: Callable[..., Stand]) -> None:
    threads, descriptors = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    one = stand()
    one.start()
    one.server.stop()
    assert threading.active_count() == threads
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


# --- ends that nobody asked for -----------------------------------------------------------------------------------


def test_a_child_in_a_group_of_its_own_goes_too(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--child=own_group", "--memory")
    one.start()
    state = one.state
    assert os.getpgid(state["child"]) == state["child"]
    one.server.stop()
    assert all_gone(state, tmp_path)


def test_one_that_ignores_sigterm_goes(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--ignore-sigterm", "--child=same_group", "--memory")
    one.start()
    state = one.state
    one.server.stop()
    assert all_gone(state, tmp_path)


def test_a_killed_program_takes_all_with_it(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--child=same_group", "--memory")
    one.start()
    state = one.state
    wait_for_memory_in_record(tmp_path, state["memory"])
    os.kill(state["program"], signal.SIGKILL)
    wait_until(lambda: not one.server.is_running())
    wait_until(lambda: all_gone(state, tmp_path))
    assert "signal 9 ended it (the machine may be out of memory)" in str(one.server.lost())
    one.server.stop()


def test_all_killed_at_once_leave_no_shared_memory(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--child=same_group", "--memory")
    one.start()
    state = one.state
    wait_for_memory_in_record(tmp_path, state["memory"])
    os.killpg(state["program"], signal.SIGKILL)
    wait_until(lambda: all_gone(state, tmp_path))
    assert not one.server.is_running()


def test_a_killed_guard_makes_a_lost_server(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--child=same_group", "--memory")
    one.start()
    state = one.state
    wait_for_memory_in_record(tmp_path, state["memory"])
    os.kill(one.record["session"], signal.SIGKILL)
    wait_until(lambda: not one.server.is_running())
    assert "guard was killed" in str(one.server.lost())
    one.server.stop()
    assert all_gone(state, tmp_path)


def test_the_guard_outlives_signals_to_the_owners_group(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(one.record["session"], number)
    with urllib.request.urlopen(f"{one.server.url}/health") as reply:
        assert reply.status == 200
    # And the program still obeys them: what a guard ignores is not handed on.
    status = Path(f"/proc/{one.state['program']}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert not ignored & (1 << (signal.SIGTERM - 1))
    assert one.server.is_running()


# --- shared memory of others --------------------------------------------------------------------------------------


@pytest.fixture
def shared_file() -> Iterator[Path]:
    """A file in /dev/shm that is there before any server."""
    path = memory(f"vzero-test-{uuid.uuid4().hex}")
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def test_what_was_there_before_stays(stand: Callable[..., Stand], shared_file: Path) -> None:
    one = stand("--map", str(shared_file))
    one.start()
    one.server.stop()
    assert shared_file.exists()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("folder/model.safetensors", "ACCESS_WRITE"), ("model", "ACCESS_READ"), ("model", "ACCESS_COPY")],
)
def test_weights_that_are_put_there_for_a_running_server_stay(
    stand: Callable[..., Stand], name: str, mode: str
) -> None:
    path = memory(f"vzero-test-{uuid.uuid4().hex}-{name}")
    one = stand(f"--map={path}", f"--map-mode={mode}")

    def command(port: int) -> list[str]:
        # Made by the guarded program itself, as late as can be.
        make = f'mkdir -p {path.parent}; head -c 4096 /dev/zero > {path}; exec "$@"'
        return ["sh", "-c", make, "sh", *one.command(port)]

    one.server = ServerProcess("student", command, environment={}, work_dir=one.work_dir, start_timeout=PATIENCE)
    one.start()
    one.server.stop()
    assert path.exists()
    path.unlink()
    if path.parent != memory(""):
        path.parent.rmdir()


def test_memory_that_another_process_uses_stays_until_then(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--memory")
    one.start()
    path = memory(one.state["memory"][0])
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        one.server.stop()
        assert path.exists()
    path.unlink()


def test_a_name_that_was_given_again_stays(stand: Callable[..., Stand], tmp_path: Path) -> None:
    one = stand("--memory")
    one.start()
    path = memory(one.state["memory"][0])
    wait_for_memory_in_record(tmp_path, one.state["memory"])
    path.unlink()
    path.write_bytes(b"another's")
    one.server.stop()
    assert path.read_bytes() == b"another's"
    path.unlink()


# --- a dead owner -------------------------------------------------------------------------------------------------

OWNER = """
import os, sys, time
from pathlib import Path
from tasks.adapters.server_process import ServerProcess

def command(port):
    return [*{program!r}, f"--port={{port}}", "--state={state}", "--child=same_group", "--memory", "--retitle"]

server = ServerProcess("student", command, environment={{}}, work_dir=Path({work_dir!r}), start_timeout=30.0)
server.start(lambda seconds: None)
if {fork} and os.fork() == 0:
    time.sleep(600)
print("ready", flush=True)
{then}
"""


def start_owner(folder: Path, fork: bool = False, then: str = "time.sleep(600)") -> subprocess.Popen[str]:
    code = OWNER.format(program=PROGRAM, state=folder / "state.json", work_dir=str(folder), fork=fork, then=then)
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    return owner


def kill(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.communicate()


def read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    state = read_state(tmp_path)
    assert lives(state["program"])
    kill(owner)
    wait_until(lambda: all_gone(state, tmp_path))
    assert sweep(tmp_path) == 0


def test_an_owner_that_ends_without_a_word_leaves_nothing(tmp_path: Path) -> None:
    owner = start_owner(tmp_path, then="raise SystemExit(0)")
    owner.communicate()
    wait_until(lambda: all_gone(read_state(tmp_path), tmp_path))


def test_a_fork_of_a_killed_owner_does_not_keep_the_server(tmp_path: Path) -> None:
    owner = start_owner(tmp_path, fork=True)
    state = read_state(tmp_path)
    owner.kill()
    owner.wait()
    # The fork has it, and would have it for ten minutes.
    (fork,) = session_members(owner.pid)
    wait_until(lambda: all_gone(state, tmp_path))
    assert lives(fork.pid)
    os.kill(fork.pid, signal.SIGKILL)
    owner.communicate()


def test_a_fork_of_the_owner_does_not_hold_up_its_stop(tmp_path: Path) -> None:
    owner = start_owner(tmp_path, fork=True, then="server.stop(); print('stopped', flush=True)")
    assert owner.stdout is not None
    assert owner.stdout.readline() == "stopped\n"
    assert all_gone(read_state(tmp_path), tmp_path)
    os.killpg(owner.pid, signal.SIGKILL)
    owner.communicate()


# --- sweep --------------------------------------------------------------------------------------------------------


def test_sweep_ends_what_a_killed_guard_left(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    state = read_state(tmp_path)
    wait_for_memory_in_record(tmp_path, state["memory"])
    os.kill(read_record(tmp_path)["session"], signal.SIGKILL)
    kill(owner)
    assert lives(state["program"])
    assert lives(state["child"])
    assert sweep(tmp_path) == 1
    assert all_gone(state, tmp_path)
    assert sweep(tmp_path) == 0


def test_sweep_finds_a_program_that_changed_its_title(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    state = read_state(tmp_path)
    wait_for_memory_in_record(tmp_path, state["memory"])
    # Its child has the environment that it was started with.
    os.kill(state["child"], signal.SIGKILL)
    os.kill(read_record(tmp_path)["session"], signal.SIGKILL)
    kill(owner)
    assert lives(state["program"])
    assert sweep(tmp_path) == 1
    assert all_gone(state, tmp_path)


def test_sweep_leaves_a_living_owners_server_alone(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    state = read_state(tmp_path)
    assert sweep(tmp_path) == 0
    assert lives(state["program"])
    assert lives(state["child"])
    assert all(memory(name).exists() for name in state["memory"])
    assert records(tmp_path)
    kill(owner)
    wait_until(lambda: all_gone(state, tmp_path))


def test_sweep_of_a_new_folder(tmp_path: Path) -> None:
    assert sweep(tmp_path / "new") == 0


FOREIGN = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def test_sweep_kills_nobody_who_has_an_old_number(tmp_path: Path, shared_file: Path) -> None:
    foreign = subprocess.Popen(
        [sys.executable, "-c", FOREIGN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert foreign.stdout is not None
    child = int(foreign.stdout.readline())
    me = find_process(os.getpid())
    assert me is not None
    record = {
        # The owner's number is in use again too, by a process that started at another time.
        "owner": me.pid,
        "owner_started": me.started - 1,
        "session": foreign.pid,
        "marker": "0123456789abcdef",
        "command": ["vllm"],
        "shared_memory": {str(shared_file): shared_file.stat().st_ino, str(memory("not-there")): 1},
    }
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "student-0123456789abcdef.json").write_text(json.dumps(record))
    assert [process.pid for process in session_members(foreign.pid)] == [child]
    assert sweep(tmp_path) == 1
    assert lives(child)
    assert lives(foreign.pid)
    assert not shared_file.exists()
    assert not records(tmp_path)
    os.killpg(foreign.pid, signal.SIGKILL)
    foreign.communicate()


def test_sweep_says_which_record_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    path = tmp_path / "servers" / "student-0123456789abcdef.json"
    path.write_text('{"owner"')
    with pytest.raises(ServerError, match=rf"{path} must be the record of a server"):
        sweep(tmp_path)
    assert path.exists()
