"""What tests of several folders share: a real Prefect server, tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.seaweed import s3_url, seaweed

from flows.server import prefect_server

__all__ = ["s3_url", "seaweed"]


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that lives as long as the session."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors gain nothing from a second thread, and last bits stay the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model folder of each family."""
    # Here, so that tests of the pure core need not import transformers.
    from support.tiny_models import FAMILIES, save_tiny_model

    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in FAMILIES}
