from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, save_tiny_model
from support.training import TrainingWorld


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


@pytest.fixture
def world(folders: dict[str, Path], tmp_path: Path) -> TrainingWorld:
    """A store with what rounds of training read."""
    return TrainingWorld(folders["qwen3_vl"], tmp_path)
