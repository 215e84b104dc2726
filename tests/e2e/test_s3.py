"""The pipeline with its store, or its data too, on a real S3 server: the same result as on a local folder."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs import small_config, start
from support.seaweed import SeaweedServer

from flows.config import RunConfig
from flows.full_pipeline import vzero
from flows.summary import RunResult
from tasks.small_world.dataset import write_dataset

pytestmark = [pytest.mark.e2e, pytest.mark.s3]

AWAY = 6.0
"""Seconds that the server is away."""


@pytest.fixture
def s3_environment(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint and key as a user gives them."""
    options = seaweed.options()
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])


def on_s3(folder: Path, url: str, **changes: Any) -> RunConfig:
    return small_config(folder, store={"url": url}, **changes)


def attempts(seaweed: SeaweedServer, url: str) -> dict[str, str]:
    """Which attempt each artefact is, by the path of its manifest."""
    client = seaweed.client()
    root = url.removeprefix("s3://")
    return {path: json.loads(client.cat_file(path))["attempt"] for path in client.glob(f"{root}/*/*/manifest.json")}


@pytest.fixture(scope="module")
def reference(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The small run on a local folder."""
    result: RunResult = vzero(small_config(tmp_path_factory.mktemp("local")))
    return result


@pytest.mark.usefixtures("s3_environment")
def test_a_store_on_s3_gives_the_same_result(
    reference: RunResult, prefect_api: str, s3_url: str, tmp_path: Path, seaweed: SeaweedServer
) -> None:
    result = vzero(on_s3(tmp_path, s3_url))
    assert result.policy == reference.policy
    assert result.scores == reference.scores
    assert result.report.startswith("s3://")
    made = attempts(seaweed, s3_url)
    # From another machine, so to say: nothing lies on the local disk. Only what reads the files of the small world,
    # which are drawn anew there, is made again; it has the same content, so nothing behind it is.
    again = vzero(on_s3(tmp_path / "elsewhere", s3_url))
    assert again.policy == result.policy
    new = set(attempts(seaweed, s3_url)) - set(made)
    assert {path.split("/")[-3] for path in new} == {"import_data", "fingerprints", "evaluation_data"}


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("stage", ["views", "replay"])
def test_a_server_that_dies_in_the_middle_and_comes_back_loses_nothing(
    stage: str, reference: RunResult, prefect_api: str, s3_url: str, tmp_path: Path, seaweed: SeaweedServer
) -> None:
    process = start(on_s3(tmp_path, s3_url), prefect_api, tmp_path / "home")
    client, root = seaweed.client(), s3_url.removeprefix("s3://")
    deadline = time.monotonic() + 120
    while not client.glob(f"{root}/{stage}/*/manifest.json") and time.monotonic() < deadline:
        time.sleep(0.1)
    before = attempts(seaweed, s3_url)
    assert before
    seaweed.kill()
    time.sleep(AWAY)
    assert process.poll() is None, "the run must wait for its store"
    seaweed.start()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    result = RunResult.model_validate_json(output[output.index("RESULT") + len("RESULT") :])
    assert result.policy == reference.policy
    after = attempts(seaweed, s3_url)
    assert {path: after[path] for path in before} == before


# --- the small world in other formats -----------------------------------------------------------------------------


def zwz(rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    table = [
        {"original_images": [row["image"]], "images": [row["image"]], "problem": row["question"], "answer": "7"}
        | {"bbox": str(row["region"]), "status": "ok"}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), path / "train.parquet")
    return {"kind": "zwz_rl_vqa", "path": "train.parquet"}


def visual_cot(rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    shutil.copytree(path / "images", path / "cot" / "small" / "images")
    lines = [
        {"question": row["question"], "answer": "7", "image": row["image"], "width": 64, "height": 64}
        | {"bboxs": [row["region"]], "dataset": "small", "split": "train"}
        for row in rows
    ]
    (path / "small_cot_train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"kind": "visual_cot", "path": "small_cot_train.jsonl"}


def seal(rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    found = []
    for row in rows:
        x1, y1, x2, y2 = row["region"]
        target = {"name": "digit", "bbox": [x1, y1, x2 - x1, y2 - y1]}
        found.append({"image": row["image"], "question": row["question"], "answer": "7", "target_instances": [target]})
    (path / "vqa_with_bbox.json").write_text(json.dumps(found))
    return {"kind": "vstar_seal", "path": "vqa_with_bbox.json"}


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("write", [zwz, visual_cot, seal])
def test_other_formats_and_images_on_s3_run_through(
    write: Any, prefect_api: str, s3_url: str, tmp_path: Path, seaweed: SeaweedServer
) -> None:
    folder = tmp_path / "data"
    write_dataset(folder, num_prompts=16, num_eval=8, seed=1)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    source = write(rows, folder)
    seaweed.client().put(f"{folder}{os.sep}", f"{s3_url}/data/", recursive=True)
    data = {
        "source": {
            "kind": source["kind"],
            "path": f"{s3_url}/data/{source['path']}",
            "evaluation_path": f"{s3_url}/data/eval.jsonl",
        }
    }
    config = on_s3(tmp_path, f"{s3_url}/store", data=data, rounds={"num_rounds": 1})
    result = vzero(config)
    assert result.scores[-1].num_questions == 8
    (samples,) = seaweed.client().glob(f"{s3_url.removeprefix('s3://')}/store/validate/*/manifest.json")
    summary = json.loads(seaweed.client().cat_file(samples))["summary"]
    assert (summary["num_samples"], summary["num_bad"]) == (16, 0)
    assert "answer" in summary["dropped_fields"]
