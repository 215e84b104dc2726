"""The stage that scores: made-up answers in a real store, aggregates by hand, a judge over real HTTP."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from support.judge_stand_in import JudgeStandIn

from tasks.adapters.dataset import SAMPLES
from tasks.adapters.evaluation import (
    PREDICTIONS,
    RESULTS,
    SCORES,
    EvaluateJob,
    PredictJob,
    compare_evaluations,
    evaluated,
)
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows, write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, ImageRef, Job, Prediction, Score
from tasks.config import EngineFingerprint, JudgeServerConfig, PromptConfig
from tasks.evaluate import evaluate
from tasks.evaluation_config import ExactProtocol, GenerationConfig, JudgeConfig, VLMEvalKitProtocol
from tasks.stage import RunContext

IMAGE = ImageRef(uri="a.png", width=8, height=8, size_bytes=1)
POLICY = ArtifactRef(stage="model", key="p", digest="p")
OPEN = ExactProtocol(answer_pattern="(.+)")


class Given(Job):
    stage: ClassVar[str] = "evaluation_data"

    name: str


class Kit:
    """A store with questions and answers to them."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "store"), folder / "work")
        self.judge = JudgeServerConfig()

    def context(self) -> RunContext:
        @contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
            yield lambda count: None

        return cast(RunContext, SimpleNamespace(store=self.store, judge=self.judge, progress=progress))

    def run(
        self, samples: list[EvaluationSample], answers: list[list[Prediction]], name: str = "", **settings: Any
    ) -> tuple[ArtifactRef, dict[str, Any], list[Score]]:
        data = self.store.produce(
            Given(name="questions"), lambda folder: write_rows(folder / SAMPLES, samples, EvaluationSample) or Outcome()
        )
        predictions = []
        how: dict[str, Any] = {
            "prompt": PromptConfig(system=name),
            "choice_template": "{question} {options}",
            "generation": GenerationConfig(),
            "engine": EngineFingerprint(engine="none", version="0", dtype="float32"),
        }
        for number, rows in enumerate(answers):
            asked = PredictJob(
                benchmark="b", role="student", policy=POLICY, data=data, crop=None, first=number, last=number + 1, **how
            )

            def write(folder: Path, rows: list[Prediction] = rows) -> Outcome:
                write_rows(folder / PREDICTIONS, rows, Prediction)
                return Outcome()

            predictions.append(self.store.produce(asked, write))
        job = EvaluateJob(
            benchmark="b",
            role="student",
            policy=POLICY,
            crop=None,
            data=data,
            predictions=tuple(predictions),
            **how,
            **{"kind": "jsonl", "protocol": VLMEvalKitProtocol(), "aggregate": "rows", "judge": None, **settings},
        )
        ref = evaluate.fn(job, self.context())
        return ref, self.store.manifest(ref).summary, read_rows(self.store.read(ref, SCORES), Score)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def choice(name: str, answer: str = "A", **more: str) -> EvaluationSample:
    return EvaluationSample(id=name, image=IMAGE, question="q", answer=answer, options=("red", "blue"), **more)


def said(name: str, response: str, seed: int = 0, truncated: bool = False) -> Prediction:
    return Prediction(sample_id=name, seed=seed, response=response, num_tokens=2, truncated=truncated)


def test_the_mean_over_rows_has_wilsons_interval(kit: Kit) -> None:
    samples = [choice(str(number), "A") for number in range(4)]
    _, summary, scores = kit.run(samples, [[said("0", "A"), said("1", "B")], [said("2", "A."), said("3", "who knows")]])
    assert (summary["accuracy"], summary["method"]) == (0.5, "wilson")
    # (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p = .5, n = 4, z = 1.96.
    assert (summary["low"], summary["high"]) == pytest.approx((0.150, 0.850), abs=5e-4)
    assert [(score.extracted, score.correct) for score in scores] == [
        ("A", True),
        ("B", False),
        ("A", True),
        (None, False),
    ]
    assert (summary["num_unanswered"], summary["num_problems"], summary["num_tokens"]) == (1, 0, 8)


def test_rotations_of_a_question_count_as_one_question(kit: Kit) -> None:
    samples = [choice(f"{q}-{c}", "A", group=q, cycle=c) for q in "xyz" for c in "12"]
    answers = [said(f"{q}-{c}", "A" if q != "z" or c == "1" else "B") for q in "xyz" for c in "12"]
    _, summary, _ = kit.run(samples, [answers], aggregate="cycles")
    # First cycle 3 of 3, second 2 of 3.
    assert summary["accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert (summary["num_questions"], summary["num_rows"], summary["method"]) == (3, 6, "bootstrap")


def test_the_mean_over_categories_is_that_of_the_finer_ones(kit: Kit) -> None:
    samples = [choice("1", category="a", subcategory="x")] + [
        choice(name, category="a", subcategory="y") for name in "234"
    ]
    answers = [said("1", "A"), said("2", "A"), said("3", "B"), said("4", "B")]
    _, summary, _ = kit.run(samples, [answers], aggregate="categories")
    assert summary["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    shares = {name: (found["accuracy"], found["num_rows"]) for name, found in summary["by_category"].items()}
    assert shares == {"a": (0.5, 4), "a/x": (1.0, 1), "a/y": (pytest.approx(1 / 3), 3)}


def test_subcategories_of_one_name_in_two_categories_are_two(kit: Kit) -> None:
    """As `table` of perception and of reasoning; a category may also have a subcategory of its own name."""
    samples = [choice(str(number), category=category, subcategory="x") for number, category in enumerate("xxxb")]
    answers = [said("0", "A"), said("1", "B"), said("2", "B"), said("3", "A")]
    _, summary, _ = kit.run(samples, [answers], aggregate="categories")
    assert summary["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    counts = {name: found["num_rows"] for name, found in summary["by_category"].items()}
    assert counts == {"x": 3, "x/x": 3, "b": 1, "b/x": 1}


def test_seeds_are_averaged_and_their_spread_is_told(kit: Kit) -> None:
    samples = [choice(name) for name in "1234"]
    right = {1: "1", 2: "12", 3: "123"}
    answers = [said(name, "A" if name in right[seed] else "B", seed) for name in "1234" for seed in right]
    _, summary, _ = kit.run(samples, [answers])
    assert summary["by_seed"] == {"1": 0.25, "2": 0.5, "3": 0.75}
    assert (summary["accuracy"], summary["method"]) == (0.5, "bootstrap")
    assert summary["seed_spread"] == pytest.approx(0.25)


def test_two_models_are_compared_question_by_question(kit: Kit) -> None:
    samples = [choice(str(number)) for number in range(10)]
    before, *_ = kit.run(samples, [[said(str(n), "A" if n < 2 else "B") for n in range(10)]], "before")
    after, *_ = kit.run(samples, [[said(str(n), "A" if n > 0 else "B") for n in range(10)][::-1]], "after")
    found = compare_evaluations(kit.store, before, after)
    assert (found.num_gained, found.num_lost, found.method) == (8, 1, "mcnemar")
    # 2 (C(9, 0) + C(9, 1)) / 2^9
    assert found.p_value == pytest.approx(20 / 512)
    assert found.difference == pytest.approx(0.7)
    assert found.verdict == "better"


def test_the_results_file_tells_how_it_was_asked_and_scored(kit: Kit) -> None:
    ref, summary, _ = kit.run([choice("1")], [[said("1", "A", truncated=True)]], "a system message")
    results = json.loads(kit.store.read(ref, RESULTS))
    assert results["protocol"] == {"kind": "vlmevalkit"}
    assert results["prompt"]["system"] == "a system message"
    assert results["generation"]["temperature"] == 0
    assert results["engine"]["engine"] == "none"
    assert summary.items() <= results.items()
    assert summary["truncated_share"] == 1.0


def test_the_same_answers_asked_for_otherwise_have_results_of_their_own(kit: Kit) -> None:
    for name in ("one", "two"):
        ref, *_ = kit.run([choice("1")], [[said("1", "A")]], name)
        assert json.loads(kit.store.read(ref, RESULTS))["prompt"]["system"] == name
        found = evaluated(kit.store, ref)
        assert (found.job.prompt.system, found.asked.prompt.system) == (name, name)


def open_question(name: str, answer: str) -> EvaluationSample:
    return EvaluationSample(id=name, image=IMAGE, question=f"what is {name}?", answer=answer)


def test_the_judge_decides_on_open_answers_that_differ(kit: Kit) -> None:
    samples = [open_question("1", "car"), open_question("2", "dog"), open_question("3", "red"), choice("4")]
    answers = [said("1", "Car."), said("2", "a hound"), said("3", "blue"), said("4", "B")]

    def reply(prompt: str, before: int) -> str:
        return "yes" if "hound" in prompt else "no"

    with JudgeStandIn(reply) as server:
        kit.judge = JudgeServerConfig(url=server.url)
        _, summary, scores = kit.run(samples, [answers], protocol=OPEN, judge=JudgeConfig(model="m"))
        asked = [body["messages"][0]["content"] for body in server.asked]
    # What the protocol accepts is right, and a letter is no matter of opinion.
    assert len(asked) == 2
    assert [score.correct for score in scores] == [True, True, False, False]
    assert summary["num_problems"] == 0


def test_what_the_judge_does_not_decide_is_wrong_and_counted(kit: Kit) -> None:
    samples = [open_question("1", "car"), open_question("2", "dog")]
    with JudgeStandIn(lambda prompt, before: "perhaps" if "hound" in prompt else "yes") as server:
        kit.judge = JudgeServerConfig(url=server.url)
        _, summary, scores = kit.run(
            samples, [[said("1", "vehicle"), said("2", "hound")]], protocol=OPEN, judge=JudgeConfig(model="m")
        )
    assert [score.correct for score in scores] == [True, False]
    assert scores[1].problem
    assert summary["num_problems"] == 1
    assert summary["accuracy"] == 0.5
