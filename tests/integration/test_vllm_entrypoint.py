"""The entry point of the vLLM image, outside of a container: it starts a real server that a run can work with."""

import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.stack import FOLDER, free_ports, running, wait_for
from support.tiny_models import picture
from support.vllm_cpu_servers import COMMAND, START_TIMEOUT, cpu_servers, make_engine, on_vllm

from tasks.adapters.models import model_folder
from tasks.adapters.vllm_command import server_environment
from tasks.config import PromptConfig, ServersConfig
from tasks.ports import SamplingRequest

pytestmark = pytest.mark.vllm

STUDENT, KEY = "embedded:student", "VZERO_VLLM_KEY"
# What a server without GPUs needs beside what every one has.
ON_CPU = ("--max-num-batched-tokens", "4096", "--block-size", "32", "--enforce-eager", "--no-enable-chunked-prefill")


def test_a_run_attaches_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv(KEY, "geheim")
    variables = dict(server_environment(ServersConfig(), 0, 1, "geheim")) | {
        "PATH": os.pathsep.join([str(Path(COMMAND[0]).parent), os.environ["PATH"]]),
        "VZERO_MODEL": str(model_folder(STUDENT)),
        "VZERO_SERVED_NAME": "student",
        "VZERO_DTYPE": "float32",
        "VZERO_MAX_MODEL_LEN": "256",
    }
    command = [str(FOLDER / "vllm-entrypoint.sh"), "--host", "127.0.0.1", "--port", str(port), *ON_CPU]
    with running(command, tmp_path, **variables) as server:

        def is_well() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                return bool(reply.status == 200)

        wait_for(is_well, server, tmp_path / "log", timeout=START_TIMEOUT)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
        where = cpu_servers(urls=[f"http://127.0.0.1:{port}"], served_name="student", api_key_variable=KEY)
        engine = make_engine(on_vllm(STUDENT), where, tmp_path / "work")
        engine.load_weights(model_folder(STUDENT), "round-1")
        prompt = engine.processor.prompt("what color", [picture(64, 64, 0)], PromptConfig())
        requests = [SamplingRequest(prompt, (0, 1))]
        (responses,) = engine.sample(requests, temperature=1.0, max_new_tokens=4, advance=lambda count: None)
        assert [response.weights for response in responses] == ["round-1"] * 2
        engine.close()
