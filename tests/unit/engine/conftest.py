from pathlib import Path

import pytest
from support.training import TrainingWorld


@pytest.fixture
def world(folders: dict[str, Path], tmp_path: Path) -> TrainingWorld:
    """A store with what rounds of training read."""
    return TrainingWorld(folders["qwen3_vl"], tmp_path)
