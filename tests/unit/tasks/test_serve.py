"""Engines as resources of a run: none is started once it has ended."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from tasks.adapters.server_process import ServerError
from tasks.artifacts import ArtifactRef
from tasks.config import ModelConfig, PlacementConfig
from tasks.serve import Engines

VLLM = {"kind": "vllm", "version": "0.32.0"}
TEACHER = ArtifactRef(stage="model", key="teacher", digest="teacher")


def engines_of(work_dir: Path, placement: PlacementConfig, engine: dict[str, str]) -> Engines:
    unused = cast(Any, None)
    return Engines(
        unused,
        unused,
        student=ModelConfig.model_validate({"path": "embedded:student", "engine": engine}),
        teacher=ModelConfig.model_validate({"path": "embedded:teacher", "engine": engine}),
        placement=placement,
        training=unused,
        work_dir=work_dir,
        track=lambda *_: nullcontext(lambda _: None),
    )


@pytest.mark.parametrize(
    ("engine", "placement", "student", "teacher", "trainer"),
    [
        ({"kind": "transformers"}, {}, None, None, None),
        ({"kind": "transformers"}, {"student_device": "cuda:0"}, 2.0, None, 2.0),
        # Servers that run already are others' cost.
        (VLLM, {"student_servers": {"urls": ["http://h:1"]}}, None, None, None),
        (
            VLLM,
            {
                "student_device": "cuda:0",
                "trainer": {"num_processes": 3, "devices": ["0", "1", "2"]},
                "student_servers": {"devices": ["3"]},
                "teacher_servers": {"devices": ["4", "5", "6", "7"], "tensor_parallel": 4},
            },
            2.0,
            8.0,
            6.0,
        ),
        (
            {"kind": "transformers"},
            {
                "student_device": "cuda:0",
                "trainer": {"num_processes": 2, "num_machines": 3, "address": "h:1", "devices": ["0", "1"]},
            },
            2.0,
            None,
            12.0,
        ),
    ],
    ids=["cpu", "one gpu", "others' servers", "one node", "three machines"],
)
def test_gpu_seconds_count_the_gpus_that_worked(
    engine: dict[str, str],
    placement: dict[str, Any],
    student: float | None,
    teacher: float | None,
    trainer: float | None,
    tmp_path: Path,
) -> None:
    engines = engines_of(tmp_path, PlacementConfig.model_validate(placement), engine)
    assert engines.gpu_seconds("student", 2.0).get("gpu_seconds") == student
    assert engines.gpu_seconds("teacher", 2.0).get("gpu_seconds") == teacher
    assert engines.gpu_seconds("trainer", 2.0).get("gpu_seconds") == trainer


def test_an_engine_asked_for_after_the_run_is_not_started(tmp_path: Path) -> None:
    """The thread that replays may be about to ask when the run is stopped."""
    engines = engines_of(tmp_path, PlacementConfig(), {"kind": "transformers"})
    with engines:
        assert engines.teacher(TEACHER) is engines.teacher(TEACHER)
    with pytest.raises(ServerError, match="the teacher must be asked while the run lasts"):
        engines.teacher(TEACHER)
