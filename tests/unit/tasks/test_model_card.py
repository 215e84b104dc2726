"""The model card: what it must say stands in it, what must not be known does not, and text of the data stays text."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from support.published import publish_job
from support.run_artifacts import HOSTILE, Run

from flows.config import RunConfig
from tasks.adapters.dataset import SAMPLES
from tasks.adapters.model_card import PublishJob, build_card
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, ImageRef, Job, Sample

LICENSES = ["CC-BY-4.0", None, "CC-BY-4.0", "odd | [x](https://evil.example) `y` *z*\n---\n# Head", HOSTILE, None, None]
SECRETS = ("hunter2", "AKIA", "sekret", "/home/", "someone", "tok3n")


class LicensedJob(Job):
    stage: ClassVar[str] = "validate"

    licenses: tuple[str | None, ...]


def licensed(run: Run, licenses: list[str | None]) -> ArtifactRef:
    def make(folder: Path) -> Outcome:
        image = ImageRef(uri="a.png", width=8, height=8, size_bytes=9)
        rows = [
            Sample(id=str(number), image=image, question="q", license=license)
            for number, license in enumerate(licenses)
        ]
        write_rows(folder / SAMPLES, rows, Sample)
        return Outcome()

    return run.store.produce(LicensedJob(licenses=tuple(licenses)), make)


def job_of(run: Run, **changes: Any) -> PublishJob:
    return publish_job(run, **{"samples": licensed(run, LICENSES), **changes})


def card_of(run: Run, commit: str | None = None, **changes: Any) -> str:
    return build_card(job_of(run, **changes), run.store, commit)


def metadata(card: str) -> dict[str, Any]:
    """As the hub's own client reads it."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


def table(card: str, heading: str) -> list[list[str]]:
    """Cells of a section's table, as a reader of Markdown sees them; the head first."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
    start = next(index for index, token in enumerate(tokens) if token.type == "inline" and token.content == heading)
    rows: list[list[str]] = []
    for token in tokens[start:]:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append("".join(child.content for child in token.children or []))
        elif token.type == "table_close":
            break
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), num_rounds=2, num_correct=(5, 15))


@pytest.fixture(scope="module")
def card(run: Run) -> str:
    return card_of(run)


def test_its_metadata_is_the_hubs(run: Run, card: str) -> None:
    found = metadata(card)
    # 15 of 20 questions; Wald's interval of the support's artefacts: .75 +- 1.96 * sqrt(.75 * .25 / 20) = .56 .. .94.
    [result] = found.pop("model-index")[0]["results"]
    assert found == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["v-zero", "knowledge-distillation", "visual-question-answering"],
    }
    assert result["dataset"] == {"name": "held-out", "type": "jsonl"}
    [metric] = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.75)
    assert metric["name"] == "accuracy, 95% interval 56.0% to 94.0%"
    assert isinstance(ModelCard(card).data, ModelCardData)
    assert ModelCard(card).data.model_name == job_of(run).name


def test_what_is_not_known_is_not_claimed(run: Run) -> None:
    card = card_of(run, license=None, evaluations=(), parent="a-run-000000000000")
    assert "license" not in metadata(card)
    assert "model-index" not in metadata(card)
    assert "The weights: not stated." in card
    assert "Nothing was measured." in card
    assert "lakeFS" not in card


def test_it_says_how_well_it_does_and_what_changed(card: str) -> None:
    head, *rows = table(card, "How well it does")
    assert head[:4] == ["benchmark", "model", "accuracy", "95% interval"]
    assert rows[0] == ["held-out", "student 0", "25.0%", "6.0% to 44.0%", "", "", ""]
    benchmark, model, accuracy, interval, change, change_interval, p_value = rows[1]
    assert (benchmark, model, accuracy, interval) == ("held-out", "student 2", "75.0%", "56.0% to 94.0%")
    assert change == "+50.0 (better)"
    low, high = (float(part) for part in change_interval.split(" to "))
    assert 0 < low < 50 < high
    # 10 questions became right, none wrong: McNemar's exact test, 2 * 0.5^10 = 0.00195.
    assert p_value == "0.002"
    # From 5 right to 18: 13 gained, none lost: 2 * 0.5^13 = 0.00024.
    assert rows[2][6] == "< 0.001"
    assert [row[1] for row in rows] == ["student 0", "student 2", "teacher <full>"]


def test_it_says_what_it_was_made_of(run: Run) -> None:
    card = card_of(run, "c0ffee", parent="a-run-0123456789ab")
    job = run.job
    found = {row[0]: row[1] for row in table(card, "What it was made of")}
    assert found["samples"] == job_of(run).samples.digest
    assert found["training set"] == job.training_set.digest
    assert found["weights"] == job.rounds[-1].train.digest
    assert found["checkpoint"] == job.selected.digest
    assert found["report"] == run.report().digest
    assert found["data version"] == "0123456789abcdef"
    assert found["parent version"] == "a-run-0123456789ab"
    assert found["lakeFS commit"] == "c0ffee"
    assert found["code"].startswith("0.1.0")
    assert "- learned from: 4 new samples and 7 that were learned before, in 2 rounds\n- trained from" in card
    assert "trained from: version a-run-0123456789ab" in card
    assert "https://arxiv.org/abs/2606.25319" in card
    without = card_of(run)
    assert {row[0]: row[1] for row in table(without, "What it was made of")}["parent version"] == "none"
    assert "trained from: weights student-weights" in without
    assert "teacher: weights teacher-weights" in without


def test_rows_are_counted_by_their_licence(card: str) -> None:
    rows = table(card, "Licences")[1:]
    assert rows[:2] == [["unknown", "3"], ["CC-BY-4.0", "2"]]
    assert sorted(rows[2:]) == sorted([["odd | [x](https://evil.example) `y` *z* --- # Head", "1"], [HOSTILE, "1"]])


def test_text_of_the_data_stays_text(run: Run) -> None:
    hostile = f"x\n---\nlicense: mit\n{HOSTILE} [a](https://evil.example) ![b](https://evil.example/b.png) | `c` $$d$$"
    card = card_of(run, data=hostile, license=f"mit\n---\nmodel-index: []\n{HOSTILE}", config={"note": hostile})
    assert card.startswith("---\n")
    assert set(metadata(card)) == {"license", "library_name", "pipeline_tag", "tags", "model-index"}
    assert metadata(card)["license"] == f"mit\n---\nmodel-index: []\n{HOSTILE}".lower()
    body = ModelCard(card).text
    assert "<script" not in body
    assert "<img" not in body
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    tags = set(re.findall(r"<([a-z][a-z0-9]*)", html))
    assert tags <= {"h1", "h2", "p", "a", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
    assert re.findall(r'href="([^"]*)"', html) == ["https://arxiv.org/abs/2606.25319"]
    shown = table(card, "What it was made of")
    assert [row[1] for row in shown if row[0] == "data version"] == [" ".join(hostile.split())]
    config = json.loads(body.rpartition("```json\n")[2].rpartition("```")[0])
    assert config == {"note": hostile}


def test_neither_secrets_nor_paths_of_the_machine_stand_in_it(run: Run) -> None:
    config = RunConfig.model_validate(
        {
            "student": {"path": "/home/someone/models/Qwen3.5-4B"},
            "teacher": {"path": "/home/someone/models/teacher model"},
            "prompt": {"template": "/no_think {question} see https://example.org/?q=1#a"},
            "data": {
                "source": {
                    "kind": "jsonl",
                    "path": "https://someone:hunter2@data.example.org/rows.jsonl?X-Amz-Signature=sekret#AKIA",
                    "image_root": "/home/someone/my images",
                    "evaluation_path": "file:///home/someone/questions.jsonl",
                },
                "compare_with": ["/home/someone/others.jsonl", "s3://bucket/path/more.jsonl"],
            },
            "benchmarks": [{"name": "own", "kind": "jsonl", "path": "/home/someone/own.jsonl", "image_root": "/home"}],
            "retrain": {"promotion": {"name": "mine", "kind": "jsonl", "path": "/home/someone/mine.jsonl"}},
            "store": {"url": "/home/someone/store"},
            "publish": {"url": "/home/someone/published"},
            "tracking": {"trackers": ["tensorboard"]},
        }
    )
    card = card_of(
        run, config=config.model_dump(mode="json"), data="https://u:tok3n@data.example.org/rows.jsonl?sekret=1"
    )
    assert not [secret for secret in SECRETS if secret in card]
    assert str(run.folder) not in card
    shown = json.loads(card.rpartition("```json\n")[2].rpartition("```")[0])
    assert shown["student"]["path"] == "Qwen3.5-4B"
    assert shown["teacher"]["path"] == "teacher model"
    assert shown["data"]["source"]["path"] == "https://data.example.org/rows.jsonl"
    assert shown["data"]["source"]["image_root"] == "my images"
    assert shown["data"]["source"]["evaluation_path"] == "questions.jsonl"
    assert shown["data"]["compare_with"] == ["others.jsonl", "s3://bucket/path/more.jsonl"]
    assert (shown["benchmarks"][0]["path"], shown["retrain"]["promotion"]["path"]) == ("own.jsonl", "mine.jsonl")
    # What is no place is shown as it was used.
    assert shown["prompt"]["template"] == "/no_think {question} see https://example.org/?q=1#a"
    assert table(card, "What it was made of")[1] == ["data version", "https://data.example.org/rows.jsonl"]


def test_the_same_artefacts_give_the_same_bytes(run: Run, card: str) -> None:
    assert card_of(run) == card


def test_the_name_follows_from_what_is_published(run: Run) -> None:
    name = job_of(run).name
    assert re.fullmatch(r"a-run-[0-9a-f]{12}", name)
    assert job_of(run).name == name
    assert job_of(run, parent="other").name != name
    # Where and when it was made is no part of it.
    assert job_of(run, data="other", report=run.samples).name == name
    assert job_of(run, policy=run.job.rounds[0].train).name != name
