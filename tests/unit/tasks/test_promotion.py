"""When a challenger becomes champion: by support, by questions set apart, and never where a benchmark may have lost."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.adapters.dataset import SAMPLES, Dataset
from tasks.adapters.evaluation import SCORES, EvaluateJob
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, ImageRef, Sample, Score
from tasks.config import EngineFingerprint, PromptConfig
from tasks.evaluation_config import ExactProtocol, GenerationConfig
from tasks.evaluation_data import EvaluationDataJob
from tasks.promotion import Pair, PromotionJob, promotion
from tasks.selection import CRITERIA, CriteriaJob, PromptCriteria
from tasks.training_set import TrainingSetJob

IMAGE = ImageRef(uri="a.png", width=8, height=8, size_bytes=1)


def ref(name: str) -> ArtifactRef:
    return ArtifactRef(stage="any", key=name, digest=name)


class World:
    """A store with criteria and scores that are written by hand."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder), folder / "work")
        dataset = Dataset(self.store, ImageReader(str(folder), 1))
        self.context: Any = SimpleNamespace(store=self.store, dataset=dataset)

    def samples(self, per_image: int = 1) -> ArtifactRef:
        """Twelve samples, several of an image."""

        def make(folder: Path) -> Outcome:
            images = [IMAGE.model_copy(update={"uri": str(number // per_image)}) for number in range(12)]
            rows = [Sample(id=str(number), image=image, question="q") for number, image in enumerate(images)]
            write_rows(folder / SAMPLES, rows, Sample)
            return Outcome()

        job = TrainingSetJob(
            rows=ref("r"), views=ref("v"), previous=None, replay_share=0, num_held_out=12, seed=per_image
        )
        return self.store.produce(job, make)

    def criteria(self, name: str, supports: list[float]) -> ArtifactRef:
        rows = [
            PromptCriteria(sample_id=str(index), divergence=-9.0, support=value, evidence_score=9.0)
            for index, value in enumerate(supports)
        ]

        def make(folder: Path) -> Outcome:
            write_rows(folder / CRITERIA, rows, PromptCriteria)
            return Outcome()

        return self.store.produce(CriteriaJob(rollouts=ref(name), replay=ref(name), round=len(name)), make)

    def pair(self, benchmark: str, champion: str, challenger: str) -> Pair:
        """Answers to the same questions, + is right."""
        return Pair(
            benchmark=benchmark,
            champion=self._evaluation(benchmark, "champion", champion),
            challenger=self._evaluation(benchmark, "challenger", challenger),
        )

    def _evaluation(self, benchmark: str, policy: str, answers: str) -> ArtifactRef:
        samples = [
            EvaluationSample(id=f"{number:05d}", image=IMAGE, question="q", answer="a")
            for number in range(len(answers))
        ]

        def write_samples(folder: Path) -> Outcome:
            write_rows(folder / SAMPLES, samples, EvaluationSample)
            return Outcome()

        def write_scores(folder: Path) -> Outcome:
            rows = [
                Score(sample_id=sample.id, seed=0, extracted="a", answer="a", correct=letter == "+")
                for sample, letter in zip(samples, answers, strict=True)
            ]
            write_rows(folder / SCORES, rows, Score)
            return Outcome()

        data = self.store.produce(
            EvaluationDataJob(
                benchmark=benchmark,
                kind="jsonl",
                source=f"{benchmark} {len(answers)}",
                models=ref("models"),
                max_image_pixels=1,
                prompt=PromptConfig(),
                choice_template="",
                max_new_tokens=1,
            ),
            write_samples,
        )
        job = EvaluateJob(
            benchmark=benchmark,
            kind="jsonl",
            role="student",
            policy=ref(policy + answers),
            crop=None,
            data=data,
            prompt=PromptConfig(),
            choice_template="",
            generation=GenerationConfig(),
            engine=EngineFingerprint(engine="e", version="1", dtype="float32"),
            predictions=(ref(answers),),
            protocol=ExactProtocol(),
            aggregate="rows",
            judge=None,
        )
        return self.store.produce(job, write_scores)

    def decide(self, **fields: Any) -> dict[str, Any]:
        defaults = {"criteria": (), "split": None, "guards": (), "margin": 0.03, "samples": self.samples()}
        job = PromotionJob.model_validate({**defaults, **fields})
        made: ArtifactRef = promotion.fn(job, self.context)
        return self.store.manifest(made).summary


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_more_support_than_chance_explains_promotes(world: World) -> None:
    champion = world.criteria("champion", [-1.0, -2.0, -1.5, -1.0])
    # Differences .5, .3, .5, .3: mean .4, standard error .1155 / 2; 3.182 of them (t with 3 degrees) are .184.
    better = world.criteria("better", [-0.5, -1.7, -1.0, -0.7])
    found = world.decide(criteria=(champion, better))
    assert found["promoted"]
    assert found["reason"] == (
        "the teacher's support on 4 prompts set aside, of 4 images: +0.400 nats per token (+0.216 .. +0.584): better"
    )


@pytest.mark.parametrize(
    ("supports", "verdict"),
    [
        # Differences 1, -.2, .5, -.1: mean .3, standard error .28.
        ([0.0, -2.2, -1.0, -1.1], "inside the noise"),
        ([-1.5, -2.4, -2.0, -1.4], "worse"),
        ([-1.0, -2.0, -1.5, -1.0], "inside the noise"),
    ],
)
def test_what_may_be_chance_or_is_worse_does_not(world: World, supports: list[float], verdict: str) -> None:
    champion = world.criteria("champion", [-1.0, -2.0, -1.5, -1.0])
    found = world.decide(criteria=(champion, world.criteria("challenger", supports)))
    assert not found["promoted"]
    assert found["reason"].endswith(verdict)


def test_one_image_decides_nothing(world: World) -> None:
    found = world.decide(criteria=(world.criteria("champion", [-1.0]), world.criteria("x", [-0.1])))
    assert not found["promoted"]
    assert "+0.900 nats per token (-inf .. +inf): inside the noise" in found["reason"]
    many = world.criteria("champion 2", [-1.0] * 12), world.criteria("y", [-0.1, -0.2] * 6)
    assert world.decide(criteria=many)["promoted"]
    assert not world.decide(criteria=many, samples=world.samples(per_image=12))["promoted"]


def test_prompts_of_one_image_are_one_piece_of_evidence(world: World) -> None:
    # By prompt: nine gain .3, three lose .3. By image: gains .3, .3, .3, -.3: mean .15, standard error .15.
    champion = world.criteria("champion", [-1.0] * 12)
    challenger = world.criteria("challenger", [-0.7] * 9 + [-1.3] * 3)
    found = world.decide(criteria=(champion, challenger), samples=world.samples(per_image=3))
    assert not found["promoted"]
    assert "12 prompts set aside, of 4 images: +0.150 nats per token (-0.327 .. +0.627)" in found["reason"]


def test_questions_set_apart_decide_where_there_are_any(world: World) -> None:
    worse = (world.criteria("champion", [-1.0, -1.1]), world.criteria("challenger", [-2.0, -2.1]))
    # Eight gained, none lost: p = 2 / 2^8.
    split = world.pair("mine", "-" * 8 + "+" * 32, "+" * 40)
    found = world.decide(criteria=worse, split=split)
    assert found["promoted"]
    assert "mine: +20.0 points" in found["reason"]
    assert "p = 0.008: better" in found["reason"]
    # Five gained, none lost: p = 2 / 2^5 = .06.
    assert not world.decide(split=world.pair("mine", "-" * 5 + "+" * 35, "+" * 40))["promoted"]
    assert not world.decide(split=world.pair("mine", "+" * 40, "-" * 20 + "+" * 20))["promoted"]


def test_a_benchmark_that_may_have_lost_more_than_the_margin_stops_it(world: World) -> None:
    split = world.pair("mine", "-" * 8 + "+" * 32, "+" * 40)
    kept = world.pair("kept", "+" * 500, "+" * 500)
    # Twenty of 500 lost: .04 at once, more than .03; of the bound, z^2 / (n + z^2) is .0054 where none is lost.
    lost = world.pair("lost", "+" * 500, "-" * 20 + "+" * 480)
    assert world.decide(split=split, guards=(kept,))["promoted"]
    found = world.decide(split=split, guards=(kept, lost))
    assert not found["promoted"]
    assert [guard["passed"] for guard in found["guards"]] == [True, False]
    assert found["reason"].endswith("; but lost may lose 5.7 points, 3.0 are allowed")
    assert world.decide(split=split, guards=(kept, lost), margin=0.06)["promoted"]


def test_a_benchmark_that_is_too_small_to_tell_stops_it_too(world: World) -> None:
    split = world.pair("mine", "-" * 8 + "+" * 32, "+" * 40)
    # Nothing lost on 40 questions: the bound is 2.706 / 42.706 = 6.3 points.
    assert not world.decide(split=split, guards=(world.pair("small", "+" * 40, "+" * 40),))["promoted"]


def test_no_benchmark_makes_a_champion(world: World) -> None:
    same = (world.criteria("champion", [-1.0, -1.1]), world.criteria("challenger", [-1.0, -1.1]))
    found = world.decide(criteria=same, guards=(world.pair("gained", "-" * 400 + "+" * 100, "+" * 500),))
    assert not found["promoted"]
    assert found["guards"][0]["passed"]
