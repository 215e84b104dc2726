"""Keys say what an artefact is derived from; digests say what it contains."""

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.artifacts import ArtifactRef, FileEntry, Job, Record, Sample, content_digest, digest_bytes, digest_json
from tasks.config import SamplingConfig


class ExampleJob(Job):
    stage: ClassVar[str] = "example"

    source: ArtifactRef
    others: tuple[ArtifactRef, ...] = ()
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0


class Pair(Record):
    left: ArtifactRef


class NestedJob(Job):
    stage: ClassVar[str] = "nested"

    pairs: tuple[Pair, ...]


def ref(digest: str, key: str = "k", stage: str = "s") -> ArtifactRef:
    return ArtifactRef(stage=stage, key=key, digest=digest)


def test_key_depends_on_the_content_of_inputs_and_not_on_how_they_were_made() -> None:
    assert ExampleJob(source=ref("a", key="1")).key == ExampleJob(source=ref("a", key="2")).key
    assert ExampleJob(source=ref("a")).key != ExampleJob(source=ref("b")).key


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"sampling": SamplingConfig(num_responses=9)},
        {"sampling": SamplingConfig(temperature=0.5)},
        {"others": (ref("a"),)},
        {"source": ref("b")},
    ],
)
def test_every_field_enters_the_key(change: dict[str, object]) -> None:
    job = ExampleJob(source=ref("a"))
    assert job.model_copy(update=change).key != job.key


def test_stage_and_version_enter_the_key() -> None:
    class OtherStage(ExampleJob):
        stage: ClassVar[str] = "other"

    class OtherVersion(ExampleJob):
        version: ClassVar[int] = 2

    assert len({job(source=ref("a")).key for job in (ExampleJob, OtherStage, OtherVersion)}) == 3


def test_key_is_golden() -> None:
    # A changed key orphans every stored artefact: change this number on purpose only, and say so in the changelog.
    assert ExampleJob(source=ref("a")).key == "416f0ecbda452176bf119bc21d7e529f"


def test_order_of_inputs_counts() -> None:
    first, second = (
        ExampleJob(source=ref("x"), others=pair).key for pair in ((ref("a"), ref("b")), (ref("b"), ref("a")))
    )
    assert first != second


def test_inputs_are_found_however_deep() -> None:
    assert ExampleJob(source=ref("a"), others=(ref("b"), ref("c"))).inputs() == {
        "source": ref("a"),
        "others.0": ref("b"),
        "others.1": ref("c"),
    }
    assert NestedJob(pairs=(Pair(left=ref("a")),)).inputs() == {"pairs.0.left": ref("a")}


def test_content_digest_is_of_names_and_contents_only() -> None:
    files = (FileEntry(path="a", size=1, sha256="1"), FileEntry(path="b", size=2, sha256="2"))
    assert content_digest(files) == content_digest(files[::-1])
    assert content_digest(files) != content_digest((files[0], FileEntry(path="c", size=2, sha256="2")))
    assert content_digest(files) != content_digest((files[0], FileEntry(path="b", size=2, sha256="3")))


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_digest_of_bytes_keeps_parts_apart(left: list[bytes], right: list[bytes]) -> None:
    assert (digest_bytes(*left) == digest_bytes(*right)) == (left == right)


def test_digest_of_json_ignores_the_order_of_keys_and_refuses_nan() -> None:
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json(float("nan"))


def test_a_training_sample_cannot_hold_an_answer() -> None:
    assert "answer" not in Sample.model_fields
    with pytest.raises(ValidationError, match="answer"):
        Sample.model_validate({"id": "1", "question": "?", "answer": "7"})
