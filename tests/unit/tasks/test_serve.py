"""Engines as resources of a run: none is started once it has ended."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from tasks.adapters.server_process import ServerError
from tasks.artifacts import ArtifactRef
from tasks.config import ModelConfig, PlacementConfig
from tasks.serve import Engines

TEACHER = ArtifactRef(stage="model", key="teacher", digest="teacher")


def test_an_engine_asked_for_after_the_run_is_not_started(tmp_path: Path) -> None:
    """The thread that replays may be about to ask when the run is stopped."""
    unused = cast(Any, None)
    engines = Engines(
        unused,
        unused,
        student=ModelConfig(path="embedded:student"),
        teacher=ModelConfig(path="embedded:teacher"),
        placement=PlacementConfig(),
        training=unused,
        work_dir=tmp_path,
        track=lambda *_: nullcontext(lambda _: None),
    )
    with engines:
        assert engines.teacher(TEACHER) is engines.teacher(TEACHER)
    with pytest.raises(ServerError, match="the teacher must be asked while the run lasts"):
        engines.teacher(TEACHER)
