"""Training data without any region: the run proposes them, and says how many the teacher supports."""

import json
from pathlib import Path

import pytest
from support.runs import small_config

from flows.full_pipeline import vzero
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import InputError

pytestmark = pytest.mark.e2e


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The small world as if nobody had drawn a box."""
    write_dataset(tmp_path / "data", num_prompts=24, num_eval=8, seed=5)
    path = tmp_path / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({name: row[name] for name in row if name != "region"}) for row in rows))
    return tmp_path


def test_regions_are_proposed_where_there_are_none(bare: Path, prefect_api: str) -> None:
    source = {"kind": "jsonl", "path": str(bare / "data" / "train.jsonl")}
    changes = {"data": {"source": source}, "rounds": {"num_rounds": 1}}
    with pytest.raises(InputError, match=r"(?s)got 24 of 24.*must have a region, or both crops, got none"):
        vzero(small_config(bare, **changes))
    result = vzero(small_config(bare, regions={"proposer": {"kind": "grid"}}, **changes))
    stages = {stage.stage: stage for stage in result.stages}
    assert "regions" in stages
    (manifest,) = (bare / "store" / "regions").glob("*/manifest.json")
    summary = json.loads(manifest.read_text())["summary"]
    assert summary["num_proposed"] == 24
    assert 0.5 < summary["kept_share"] <= 1
    report = Path(result.report).read_text()
    assert "regions proposed" in report
    assert f"24, of which kept {summary['num_kept']}" in report
