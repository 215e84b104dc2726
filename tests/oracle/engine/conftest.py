import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, save_tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model folder of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}


class Float64Torch:
    """`torch`, but what a module makes float32 becomes float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the models' own casts to float32 (norms, linear attention): they would hide what is compared."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
