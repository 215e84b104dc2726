"""Facts that follow from several rows, or from sizes alone."""

from pathlib import Path
from typing import Any

import pytest

from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.row_facts import Fingerprint, Prompts, RowFacts, gather_facts
from tasks.artifacts import ImageRef, ImportedRow
from tasks.config import PromptConfig
from vzero_core.config import NegativeCropConfig, PositiveCropConfig, ViewConfig
from vzero_core.views import Box

HASHES = {"same": "00000000000000ff", "near": "00000000000000fe", "other": "ffffffffffffff00"}


def image(width: int = 64, height: int = 48, uri: str = "a.png") -> ImageRef:
    return ImageRef(uri=uri, width=width, height=height, size_bytes=1, sha256="0")


def rows(*changes: dict[str, Any]) -> list[ImportedRow]:
    good: dict[str, Any] = {"question": "w1 w2", "image": image(), "region": Box(4, 4, 12, 12)}
    return [ImportedRow(row=number, id=f"r{number}", **(good | change)) for number, change in enumerate(changes, 1)]


@pytest.fixture
def prompts(folders: dict[str, Path]) -> Prompts:
    processor = PromptProcessor(folders["qwen3_vl"])
    views = ViewConfig(
        positive=PositiveCropConfig(min_side_px=8, min_pixels=64),
        negative=NegativeCropConfig(downsample=1, when_impossible="quarantine"),
    )
    return Prompts(processor, processor, PromptConfig(), views)


def gather(prompts: Prompts, given: list[ImportedRow], others: Any = ()) -> list[RowFacts]:
    return gather_facts(given, reserved=["<special>"], others=others, max_distance=4, prompts=prompts)


@pytest.mark.parametrize(
    "bad",
    [
        {"problem": "image must exist"},
        {"region": Box(12, 12, 4, 4)},
        {"question": "w1 w2 <special>"},
        {"image": image(20_000, 1)},
        {"positive_image": image()},
    ],
)
def test_a_row_that_is_set_aside_makes_no_later_one_a_duplicate(prompts: Prompts, bad: dict[str, Any]) -> None:
    hashed = {"image_hash": HASHES["same"]}
    good = gather(prompts, rows(hashed, hashed))
    assert [fact.same_as_row for fact in good] == [None, 1]
    assert [fact.same_as_row for fact in gather(prompts, rows(hashed | bad, hashed))] == [None, None]
    same_id = [row.model_copy(update={"id": "x"}) for row in rows(bad, {})]
    assert [fact.same_id_as_row for fact in gather(prompts, same_id)] == [None, None]


def test_the_nearest_picture_of_evaluation_data_is_named(prompts: Prompts) -> None:
    others = [
        ("a.jsonl", Fingerprint(row=3, image_hash=HASHES["other"], question="w1 w2")),
        ("b.jsonl", Fingerprint(row=9, image_hash=HASHES["same"], question="W1  w2?")),
    ]
    facts = gather(prompts, rows({"image_hash": HASHES["near"]}, {"image_hash": None}), others)
    assert facts[0].overlap == "b.jsonl row 9 (1 of 64 bits differ; the same question)"
    assert facts[1].overlap is None


def test_an_image_that_the_model_refuses_is_named_and_stops_nothing(prompts: Prompts) -> None:
    facts = gather(prompts, rows({"image": image(20_000, 1, "long.png")}, {}))
    assert facts[0].problem is not None
    assert "image long.png of 20000x1 is refused by the model's processor: absolute aspect ratio" in facts[0].problem
    assert facts[0].student_tokens is None
    assert facts[1].student_tokens is not None


def test_whether_an_irrelevant_crop_fits_is_known_from_sizes(prompts: Prompts) -> None:
    facts = gather(prompts, rows({}, {"region": Box(0, 0, 63, 47)}, {"region": Box(0, 0, 32, 48)}))
    assert [fact.crop_problem is None for fact in facts] == [True, False, True]
    assert "no such place" in (facts[1].crop_problem or "")


def test_a_crop_that_is_yet_to_be_proposed_counts_as_the_whole_image(prompts: Prompts) -> None:
    small, unknown = gather(prompts, rows({}, {"region": None}))
    assert (unknown.positive_tokens or 0) > (small.positive_tokens or 0)
    assert unknown.student_tokens == small.student_tokens
