"""A bucket's endpoint and key from a Prefect block instead of the environment."""

import uuid
from pathlib import Path

import fsspec
import pytest
from prefect.filesystems import RemoteFileSystem
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.seaweed import BUCKET, SeaweedServer

from flows.run import open_store
from tasks.config import StoreConfig
from vzero_core.errors import ConfigError

pytestmark = [pytest.mark.e2e, pytest.mark.s3]


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor an earlier test has a key."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(fsspec.config.conf, "s3", {})


@pytest.mark.parametrize("prefix", ["", "remote-file-system/"])
def test_the_block_s_settings_open_the_bucket(
    prefix: str, prefect_api: str, seaweed: SeaweedServer, tmp_path: Path
) -> None:
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        RemoteFileSystem(basepath=url, settings=seaweed.options()).save(name)
        store = open_store(StoreConfig(url=url, prefect_block=f"{prefix}{name}"), tmp_path)
    assert len(store.identity) == 32
    assert seaweed.client().exists(f"{url.removeprefix('s3://')}/store.json")


def test_a_block_that_is_not_there_is_named(prefect_api: str, tmp_path: Path) -> None:
    with (
        temporary_settings({PREFECT_API_URL: prefect_api}),
        pytest.raises(ConfigError, match=r"store.prefect_block must name a Remote File System block .* 'no-such'"),
    ):
        open_store(StoreConfig(url="s3://vzero/x", prefect_block="no-such"), tmp_path)
