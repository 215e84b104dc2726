"""A real Prefect server for the session."""

from collections.abc import Iterator

import pytest

from flows.server import prefect_server


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that lives as long as the session."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url
