"""Rows survive Parquet unchanged, and equal rows give equal bytes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tasks.adapters.tables import read_rows, schema_of, write_rows
from tasks.artifacts import BadRow, ImageRef, Record, Replay, Rollout, Sample, Weight
from vzero_core.views import Box

IMAGE = ImageRef(uri="a.png", width=4, height=5, size_bytes=6, sha256="7")
ROWS: list[Record] = [
    Sample(id="1", image=IMAGE, question="what?", region=Box(0.1, 1 / 3, 3.0, 4.0), license="CC0"),
    Sample(id="2", image=IMAGE, question="ü \n 🦊", region=Box(0.0, 0.0, 1.0, 1.0), detail_image=IMAGE),
    BadRow(row=3, id=None, reason="why"),
    Rollout(
        sample_id="1", index=0, policy="p", token_ids=(151_935, 0), logprobs=(-0.5, -1.25), text="x", truncated=False
    ),
    Replay(sample_id="1", index=0, logprobs_positive=(-1.0,), max_logprobs=(-0.5,)),
    Replay(
        sample_id="1",
        index=1,
        logprobs_none=(-1.0, -2.0),
        max_logprobs=(0.0, 0.0),
        topk_ids=((1, 2), (3, 4)),
        topk_logprobs=((-0.5, -1.0), (-0.25, -3.0)),
    ),
    Weight(sample_id="1", index=0, evidence_score=1 / 3, weights=(1.5,)),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_rows_survive(row: Record, tmp_path: Path) -> None:
    write_rows(tmp_path / "t.parquet", [row, row], type(row))
    assert read_rows((tmp_path / "t.parquet").read_bytes(), type(row)) == [row, row]


def test_columns_that_are_not_asked_for_have_their_defaults(tmp_path: Path) -> None:
    row = ROWS[5]
    assert isinstance(row, Replay)
    write_rows(tmp_path / "t.parquet", [row], Replay)
    content = (tmp_path / "t.parquet").read_bytes()
    assert row.topk_ids is not None
    assert read_rows(content, Replay, ["index", "sample_id", "max_logprobs"]) == [
        Replay(sample_id="1", index=1, max_logprobs=row.max_logprobs)
    ]
    with pytest.raises(ValidationError, match="max_logprobs"):
        read_rows(content, Replay, ["sample_id", "index"])


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, ROWS[:2], Sample)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_columns_do_not_depend_on_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "empty", [], Replay)
    assert pq.read_schema(tmp_path / "empty").equals(schema_of(Replay))
    assert read_rows((tmp_path / "empty").read_bytes(), Replay) == []
    assert schema_of(Weight).field("evidence_score").type == pa.float64()
    assert schema_of(Weight).field("weights").type == pa.list_(pa.float32())
