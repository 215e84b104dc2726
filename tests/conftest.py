"""What tests of several folders share: a real Prefect server, tiny models."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.seaweed import s3_url, seaweed

from flows.server import prefect_server

__all__ = ["s3_url", "seaweed"]

# No deadline: the first call of a torch operator is slow. No database: no run depends on an earlier one.
# Derandomised: the same examples in every run; raise max_examples to search further.
settings.register_profile("vzero", deadline=None, database=None, derandomize=True, max_examples=30)
settings.load_profile("vzero")


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that lives as long as the session."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """A command of ours that a test calls writes its warnings to a stream that ends with the test."""
    log = logging.getLogger("vzero")
    before = list(log.handlers)
    yield
    log.handlers[:] = before


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
