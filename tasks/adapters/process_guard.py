"""Guard of a server program: when its owner stops it or is gone, the program goes, with all it started (Linux).

Started by `ServerProcess` as `python -m tasks.adapters.process_guard RECORD OWNER MARKER COMMAND...`, in a session of
its own, with a pipe from its owner as standard input and one to it as standard output. It is a program beside the
owner, so that it still works where the owner was killed; the standard library alone, so that it starts at once.

What the program starts belongs to the guard's session, in whatever process group: one server may be several groups,
and, while the process that opened it lives, a session of its own.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

_MARKER = "VZERO_SERVER"
"""Variable in a program's environment that tells whose process it is when process ids were used again."""
_INTERVAL = 1.0
"""Seconds between two looks at the program's shared memory; what is made and killed between two looks stays."""
_PATIENCE = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 30.0))
"""Seconds that processes are given to go; after SIGKILL, a GPU's memory may take its time."""
_SHARED_MEMORY = Path("/dev/shm")


class Process(NamedTuple):
    """A process of this machine."""

    pid: int
    group: int
    started: int
    """Clock ticks since the machine's start; together with the pid it names a process for good."""


@dataclass
class Record:
    """What is known of a running server, for those who find it without its guard."""

    owner: int
    owner_started: int
    session: int
    marker: str
    command: list[str]
    shared_memory: dict[str, int]
    """Inode of each piece of shared memory that the program made, by its path."""

    def save(self, path: Path) -> None:
        """Write it in one step: who reads it meanwhile finds the old one."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)


class _Stat(NamedTuple):
    """What the kernel tells of a process."""

    process: Process
    state: str
    parent: int
    session: int


def find_process(pid: int) -> Process | None:
    """Give a process by its id, or None where there is none, or one that only waits to be reaped."""
    stat = _stat(pid)
    return None if stat is None or stat.state in "ZX" else stat.process


def session_members(session: int) -> list[Process]:
    """Give what runs in a guard's session, and in sessions that were opened from it, without the guard."""
    stats = {pid: stat for pid in _pids() if (stat := _stat(pid))}

    def belongs(stat: _Stat | None) -> bool:
        return stat is not None and (stat.session == session or belongs(stats.get(stat.parent)))

    return [stat.process for pid, stat in stats.items() if pid != session and stat.state not in "ZX" and belongs(stat)]


def _stat(pid: int) -> _Stat | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The program's name stands in brackets, and may have brackets itself.
    state, parent, group, session, *rest = stat.rpartition(")")[2].split()
    return _Stat(Process(pid, int(group), started=int(rest[15])), state, int(parent), int(session))


def is_marked(pid: int, marker: str) -> bool:
    """Tell whether a process, or what it comes from, was started with a guard's marker."""
    return f"{_MARKER}={marker}".encode() in _words(pid, "environ")


def is_guarded(pid: int) -> bool:
    """Tell whether a process is a guard, or one that a guard will end."""
    marked = any(word.startswith(f"{_MARKER}=".encode()) for word in _words(pid, "environ"))
    return marked or b"tasks.adapters.process_guard" in _words(pid, "cmdline")


def _words(pid: int, what: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def end_session(session: int) -> None:
    """End all that runs in a guard's session, politely at first.

    Raises:
        TimeoutError: processes are left that not even SIGKILL ends.
    """
    members = session_members(session)
    for how, patience in _PATIENCE:
        deadline = time.monotonic() + patience
        told: set[int] = set()
        while members and time.monotonic() < deadline:
            groups = {process.group for process in members}
            for group in groups - told:
                with suppress(ProcessLookupError):
                    os.killpg(group, how)
            told |= groups
            time.sleep(0.05)
            members = session_members(session)
    if members:
        raise TimeoutError(f"processes {[process.pid for process in members]} must end on SIGKILL, but they did not")


def unlink_shared_memory(inodes: dict[str, int]) -> None:
    """Unlink shared memory, but what somebody uses, and what has a name of it without being it.

    Args:
        inodes: inode by path.
    """
    used = {inode for pid in _pids() for _, inode in _mapped(pid)}
    for path, inode in inodes.items():
        # One that another user made, and the program wrote to, is not the program's.
        with suppress(FileNotFoundError, PermissionError):
            if inode not in used and os.stat(path).st_ino == inode:
                os.unlink(path)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _mapped(pid: int) -> Iterator[tuple[str, int]]:
    """Give permissions and inode of what a process has mapped below /dev/shm."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    for line in maps.splitlines():
        if f" {_SHARED_MEMORY}/" in line:
            _, permissions, _, _, inode, _ = line.split(maxsplit=5)
            yield permissions, int(inode)


def _made_by(session: int, not_these: frozenset[int]) -> dict[str, int]:
    written = {
        inode
        for process in session_members(session)
        for permissions, inode in _mapped(process.pid)
        if permissions == "rw-s"
    }
    # Model files may lie in /dev/shm too, and be mapped: they were there before, are only read, or lie in folders.
    # By inode, for a semaphore's maker has it mapped under a name that was unlinked at once.
    return {entry.path: entry.inode() for entry in os.scandir(_SHARED_MEMORY) if entry.inode() in written - not_these}


def _watch(record: Record, path: Path, program: subprocess.Popen[bytes], not_these: frozenset[int]) -> None:
    """Return when the program has ended, or is to end: the owner says so, or is gone."""
    record.save(path)
    saved: dict[str, int] = {}
    exited = os.pidfd_open(program.pid)
    while True:
        ready, _, _ = select.select([sys.stdin, exited], [], [], _INTERVAL)
        record.shared_memory |= _made_by(record.session, not_these)
        if record.shared_memory != saved:
            # On a full disk it is tried again at the next look; what counts while the guard lives is in its memory.
            with suppress(OSError):
                record.save(path)
                saved = dict(record.shared_memory)
        if exited in ready:
            # It is not reaped here, so that its process group's number is given to nobody else yet.
            end = os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
            assert end is not None, "without WNOHANG there is a result"
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            with suppress(BrokenPipeError):
                os.write(sys.stdout.fileno(), str(code).encode())
            return
        # Where the owner forked, its children hold the pipe open after its death.
        if ready or os.getppid() != record.owner:
            return


def _main(path: Path, owner_pid: int, marker: str, command: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Not SIG_IGN: the program would inherit that.
        signal.signal(number, lambda *_: None)
    owner = find_process(owner_pid)
    if owner is None:
        return
    there_before = frozenset(entry.inode() for entry in os.scandir(_SHARED_MEMORY))
    # Without SPT_NOENV, a program that sets its title with setproctitle overwrites what /proc shows of its environment.
    environment = {**os.environ, _MARKER: marker, "SPT_NOENV": "1"}
    try:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, env=environment, process_group=0
        )
    except OSError as error:
        sys.exit(str(error))
    record = Record(owner.pid, owner.started, os.getpid(), marker, command, {})
    try:
        _watch(record, path, program, there_before)
    finally:
        end_session(record.session)
        program.wait()
        unlink_shared_memory(record.shared_memory)
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
