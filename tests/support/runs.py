"""Small runs of the real flow."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.config import PROJECT, RunConfig


def small_config(folder: Path, **changes: Any) -> RunConfig:
    """A run of seconds: 3 rounds of 8 prompts with 4 responses, 40 questions."""
    values: dict[str, Any] = {
        "name": "small",
        "data": {"source": {"kind": "small_world", "num_prompts": 64, "num_evaluation": 40}},
        "sampling": {"num_responses": 4},
        "rounds": {"num_rounds": 3, "prompts_per_round": 8},
        "evaluate": {"every": 2},
        "selection": {"num_prompts": 8, "num_responses": 2, "every": 2},
        "store": {"url": str(folder / "store")},
        "publish": {"url": str(folder / "published")},
        "placement": {"work_dir": str(folder / "work"), "threads": 1},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def start(config: RunConfig, api: str, home: Path) -> subprocess.Popen[str]:
    """Start the flow in a process of its own."""
    code = (
        "import sys; from flows.full_pipeline import vzero; from flows.config import RunConfig; "
        "result = vzero(RunConfig.model_validate_json(sys.argv[1])); print('RESULT' + result.model_dump_json())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, config.model_dump_json()],
        cwd=PROJECT,
        env={**os.environ, "PREFECT_API_URL": api, "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "WARNING"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
