import sys
from typing import Any

import pytest
import torch


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
