"""How a vLLM server is started: its command line and its environment (docs/VLLM.md)."""

import json
from collections.abc import Mapping
from pathlib import Path

from tasks.config import ModelConfig, ServersConfig, VLLMEngine

IMAGES_PER_PROMPT = 2
"""The full image, and a crop beside it."""


def server_command(folder: Path, model: ModelConfig, servers: ServersConfig, port: int) -> list[str]:
    """Give the command line of a server on a port of 127.0.0.1.

    Args:
        folder: model folder whose weights it starts with.
        model: arithmetic and quantisation.
        servers: parallelism, memory and further flags.
        port: where it listens.
    """
    assert isinstance(model.engine, VLLMEngine), "asked for servers of vLLM alone"
    flags = {
        "--model": str(folder),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": servers.served_name,
        "--dtype": model.dtype,
        "--limit-mm-per-prompt": json.dumps({"image": IMAGES_PER_PROMPT, "video": 0}),
        # All that the vocabulary has: how many are wanted says each request.
        "--max-logprobs": "-1",
        # Log-probs of the model itself, before temperature and bans: what the trainer computes.
        "--logprobs-mode": "raw_logprobs",
        # Sampling settings in the model's folder must not change the policy that is sampled.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-scale-out", "--enable-prompt-tokens-details"]
    if model.engine.quantization is not None:
        flags["--quantization"] = model.engine.quantization
    if servers.max_model_len is not None:
        flags["--max-model-len"] = str(servers.max_model_len)
    if servers.devices:
        flags["--tensor-parallel-size"] = str(servers.tensor_parallel)
        flags["--data-parallel-size"] = str(servers.data_parallel)
        flags["--gpu-memory-utilization"] = str(servers.memory_share)
    else:
        # Without chunked prefill a whole prompt must fit into one step, and with it a seed ends a CPU engine.
        longest = servers.max_model_len or _context_tokens(folder)
        flags["--max-num-batched-tokens"] = str(max(longest, 4096))
        # Only a multiple of 32 works on CPU; the default of 128 finds no shorter prefix in the cache.
        flags["--block-size"] = "32"
        switches += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return [*servers.command, *(part for flag in flags.items() for part in flag), *switches, *servers.flags]


def server_environment(servers: ServersConfig, replica: int, threads: int, api_key: str) -> Mapping[str, str]:
    """Give what a server's environment has beside that of this process.

    Args:
        servers: devices and further variables.
        replica: number of the server, from 0; each has devices of its own.
        threads: CPU threads of a server without GPUs.
        api_key: what it asks of every request.
    """
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Weights are exchanged over routes that are there in this mode alone.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_API_KEY": api_key,
    }
    if servers.devices:
        each = servers.tensor_parallel * servers.data_parallel
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(servers.devices[replica * each :][:each])
    else:
        environment |= {
            # A build of vLLM for GPUs would take the trainer's.
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    return environment | servers.environment


def _context_tokens(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["max_position_embeddings"])
