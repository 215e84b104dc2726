"""The artefacts of a run that was never computed: all of them are written by hand, for pages that show runs."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from tasks.adapters.dataset import (
    FINDINGS,
    QUARANTINE,
    SAMPLES,
    VIEW_SHARDS,
    Dataset,
    SampleViews,
    ViewShard,
    to_png,
    views_file,
)
from tasks.adapters.evaluation import PREDICTIONS, SCORES, EvaluateJob, PredictJob
from tasks.adapters.images import ImageReader
from tasks.adapters.report_page import build_page
from tasks.adapters.row_facts import Finding
from tasks.adapters.store import Outcome, Store, write_json
from tasks.adapters.tables import write_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS, WEIGHTS, CheckpointJob, TrainJob
from tasks.artifacts import (
    ArtifactRef,
    BadRow,
    EvaluationSample,
    Job,
    Prediction,
    Replay,
    Role,
    Rollout,
    Sample,
    Score,
    Weight,
)
from tasks.build_views import ViewShardJob, ViewsJob
from tasks.check_models import CheckModelsJob, ModelJob
from tasks.config import EngineFingerprint, OptimizerConfig, PromptConfig, SamplingConfig
from tasks.data_docs import DataDocsJob
from tasks.evaluation_config import BenchmarkKind, ExactProtocol, GenerationConfig, Protocol
from tasks.gate import GateJob
from tasks.import_data import ImportDataJob
from tasks.replay import ReplayJob
from tasks.report import Evaluation, ReportJob, RoundRefs, report
from tasks.rollouts import RolloutsJob
from tasks.selection import CriteriaJob, SelectJob
from tasks.training_set import TrainingSetJob
from tasks.validate import ValidateJob
from vzero_core.config import Gate, GateConfig, PolicyGradientLoss, ViewConfig, required_views
from vzero_core.views import Box

HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>"
ENGINE = EngineFingerprint(engine="none", version="0", torch="0", dtype="float32")
PROMPT = PromptConfig()
NUM_QUESTIONS = 20
GATE_SUMMARIES: dict[str, dict[str, Any]] = {
    "contrastive": {
        "evidence_score": 0.1,
        "mean_spread": 0.2,
        "median_spread": 0.2,
        "share_below_min_spread": 0.5,
        "share_at_w_min": 0.25,
        "share_at_w_max": 0.25,
        "effective_sample_share": 0.7,
        "weight_length_correlation": None,
    },
    "prefix_trust": {"mean_token_weight": 0.6},
    "off": {},
}
NAMES = ("plain", "hostile", "third", "fourth")


class Run:
    """Writes the artefacts of a run of few rounds, each of which asks all the training prompts."""

    def __init__(
        self,
        folder: Path,
        gate: Gate | None = None,
        *,
        name: str = "a-run",
        num_correct: tuple[int, ...] = (5, 15),
        num_rounds: int = 2,
        chosen: int | None = None,
        names: tuple[str, ...] = NAMES,
        protocol: Protocol | None = None,
        tokens: bool = True,
        seeds: tuple[int, ...] = (0,),
        per_round: int = 2,
        kind: BenchmarkKind = "jsonl",
        with_crop: bool = False,
    ) -> None:
        """Write the run.

        Args:
            folder: gets a store, and images outside it.
            gate: of the run.
            name: of the run.
            num_correct: of 20 held-out questions, by the student before, and after; empty: nothing is measured.
            num_rounds: so many.
            chosen: the round that was chosen by criteria; None: there are none.
            names: of the training prompts.
            protocol: how held-out answers are scored.
            tokens: whether rollouts hold the texts of their tokens.
            seeds: of the held-out answers.
            per_round: prompts of a round; rounds take them in turn.
            kind: which benchmark the held-out questions are said to be.
            with_crop: whether the student before is also measured with the crop beside the image.
        """
        folder.mkdir(exist_ok=True)
        self.folder, self.store = folder, Store(str(folder / "store"), folder / "work")
        self.gate: Gate = gate or GateConfig(min_spread=1e-3)
        self.name, self.names, self.tokens, self.seeds = name, names, tokens, seeds
        self.per_round, self.kind, self.with_crop = per_round, kind, with_crop
        self.protocol = protocol or ExactProtocol()
        self.student, self.teacher = self._model("student"), self._model("teacher")
        self._data()
        self.dataset = Dataset(self.store, ImageReader(str(folder), 10**6))
        self.benchmarks = {"held-out": Dataset(self.store, ImageReader(str(folder), 10**6))}
        rounds: list[RoundRefs] = []
        for number in range(1, num_rounds + 1):
            rounds.append(self._round(number, rounds[-1].train if rounds else self.student))
        states = [self.student, *(done.train for done in rounds)]
        criteria = [self._criteria(number, states[number]) for number in range(len(states))] if chosen else []
        selection = self._select(criteria, chosen, num_rounds) if chosen else None
        self.job = ReportJob(
            name=name,
            config={
                "name": name,
                "note": HOSTILE,
                "data": {"source": _source(folder)},
                "benchmarks": _benchmarks(folder),
            },
            samples=self.samples,
            docs=self._put(DataDocsJob(samples=self.samples), {}, {}),
            regions=None,
            views=self.views,
            training_set=self.training_set,
            rounds=tuple(rounds),
            evaluations=tuple(self._evaluations(states, num_correct, chosen or num_rounds)),
            criteria=tuple(criteria),
            selection=selection,
            selected=self._put(
                CheckpointJob(train_key=rounds[(chosen or num_rounds) - 1].train.key),
                {},
                {"weights": "w" * 32, "num_updates": 4},
            ),
        )

    def report(self) -> ArtifactRef:
        """Let the stage make the report."""
        benchmarks = {name: SimpleNamespace(data=data) for name, data in self.benchmarks.items()}
        context: Any = SimpleNamespace(store=self.store, dataset=self.dataset, benchmarks=benchmarks)
        return report.fn(self.job, context)

    def page(self) -> str:
        """Build the page anew."""
        fresh = {name: Dataset(self.store, found.images) for name, found in self.benchmarks.items()}
        return build_page(self.job, self.store, Dataset(self.store, self.dataset.images), fresh)

    def _put(
        self,
        job: Job,
        tables: dict[str, tuple[list[Any], Any]],
        summary: dict[str, Any],
        measured: dict[str, float] | None = None,
        files: dict[str, Any] | None = None,
    ) -> ArtifactRef:
        def make(folder: Path) -> Outcome:
            (folder / "name").write_text(job.key)
            for name, (rows, record) in tables.items():
                write_rows(folder / name, rows, record)
            for name, value in (files or {}).items():
                write_json(folder / name, value)
            return Outcome(summary=summary, measured=measured or {})

        return self.store.produce(job, make)

    def _model(self, role: Role) -> ArtifactRef:
        return self._put(ModelJob(weights=f"{role}-weights", role=role), {}, {"role": role})

    def _data(self) -> None:
        images = ImageReader(str(self.folder), 10**6)
        if not (self.folder / "full.png").exists():
            Image.effect_noise((40, 20), 50).convert("RGB").save(self.folder / "full.png")
        self.image = images.inspect("full.png", decode=True).ref
        samples = [
            Sample(
                id=name,
                image=self.image,
                question=HOSTILE if name == "hostile" else "what colour?",
                region=Box(4, 4, 8, 8),
            )
            for name in self.names
        ]
        crop = to_png(Image.new("RGB", (8, 8), "red"))
        views = [
            SampleViews(
                sample_id=sample.id,
                positive_png=crop,
                negative_png=crop,
                positive_box=(4, 4, 12, 12),
                negative_box=(10, 0, 18, 8),
                positive_frame=(80, 40),
                negative_frame=(20, 10),
            )
            for sample in samples
        ]
        bad = [BadRow(row=3, id="broken", reason=f"image must exist {HOSTILE}")]
        findings = [
            Finding(name="image can be read", expectation="e", severity="critical", num_rows=1),
            Finding(name="image is in no evaluation data", expectation="e", severity="critical", num_rows=0),
            Finding(name="licence is named", expectation="e", severity="warning", num_rows=2),
        ]
        imported = self._put(ImportDataJob(source="s", images="decode", max_image_pixels=10**6), {}, {})
        self.samples = self._put(
            ValidateJob(
                rows=imported,
                models=self._put(CheckModelsJob(student=self.teacher, teacher=self.teacher, prompt=PROMPT), {}, {}),
                compared=(),
                prompt=PromptConfig(),
                views=ViewConfig(),
                region_required=True,
                max_region_share=1.0,
                max_hash_distance=4,
                max_prompt_tokens=None,
                max_new_tokens=8,
            ),
            {SAMPLES: (samples, Sample), QUARANTINE: (bad, BadRow), FINDINGS: (findings, Finding)},
            {
                "num_samples": len(samples),
                "num_bad": 1,
                "num_clipped": 1,
                "dropped_fields": ["answer"],
                "bad": [],
                "unchecked": [],
            },
        )
        shards = [
            self._put(
                ViewShardJob(samples=self.samples, views=ViewConfig(), seed=0, shard=shard, num_shards=len(self.names)),
                {SAMPLES: (samples[shard:][:1], Sample), views_file(0): (views[shard:][:1], SampleViews)},
                {"num_samples": 1, "num_bad": 0},
            )
            for shard in range(len(samples))
        ]
        rows = [ViewShard(ref=shard, num_samples=1).model_dump() for shard in shards]
        self.views = self._put(
            ViewsJob(shards=tuple(shards), max_bad_share=0.5),
            {SAMPLES: (samples, Sample), QUARANTINE: ([], BadRow)},
            {"num_samples": len(samples), "num_bad": 0},
            files={VIEW_SHARDS: rows},
        )
        self.training_set = self._put(
            TrainingSetJob(rows=imported, views=self.views, previous=None, replay_share=0.0, num_held_out=0, seed=0),
            {SAMPLES: (samples, Sample)},
            {
                "num_samples": len(samples),
                "num_new": len(samples),
                "num_replayed": 7,
                "num_held_out": 5,
                "num_parts": 2,
            },
            files={VIEW_SHARDS: rows},
        )

    def _round(self, number: int, policy: ArtifactRef) -> RoundRefs:
        rollouts, replays = self._sampled(number, policy, held_out=False)
        keys = self._keys(number)
        gate = self._put(
            GateJob(replays=(replays,), gate=self.gate, target="positive", round=number),
            {WEIGHTS: ([self._weight(number, *key) for key in keys], Weight)},
            GATE_SUMMARIES[self.gate.kind],
        )
        job = TrainJob(
            policy=policy,
            samples=self.training_set,
            rollouts=(rollouts,),
            replays=(replays,),
            gate=gate,
            prompt=PROMPT,
            target="positive",
            loss=PolicyGradientLoss(),
            optimizer=OptimizerConfig(),
            engine=ENGINE,
            seed=0,
            round=number,
        )
        summary = {"loss": 1 / number, "divergence_k1": 0.5, "divergence_k3": 0.5, "entropy": 0.4, "grad_norm": None}
        train = self._put(job, {}, {**summary, "num_updates": 2 * number, "num_tokens": 8})
        return RoundRefs(round=number, rollouts=(rollouts,), replays=(replays,), gate=gate, train=train)

    def _keys(self, number: int) -> list[tuple[str, int]]:
        """Prompts are asked in turn, so that the first ones come again once all were asked."""
        start = self.per_round * (number - 1)
        chosen = [self.names[(start + offset) % len(self.names)] for offset in range(self.per_round)]
        return [(name, index) for name in chosen for index in range(2)]

    def _sampled(self, number: int, policy: ArtifactRef, *, held_out: bool) -> tuple[ArtifactRef, ArtifactRef]:
        keys = self._keys(number)
        rollouts = self._put(
            RolloutsJob(
                policy=policy,
                samples=self.training_set,
                prompt=PROMPT,
                sampling=SamplingConfig(num_responses=2),
                engine=ENGINE,
                seed=0,
                round=number,
                prompts_per_round=self.per_round,
                shard=0,
                num_shards=1,
                held_out=held_out,
            ),
            {ROLLOUTS: ([self._rollout(*key) for key in keys], Rollout)},
            {"num_responses": 4, "num_tokens": 8, "mean_length": 2.0, "truncated_share": 0.25},
            {"tokens_per_second": 100.0},
        )
        views = required_views(self.gate, "positive")
        replays = self._put(
            ReplayJob(
                teacher=self.teacher,
                rollouts=rollouts,
                views=self.training_set,
                prompt=PROMPT,
                replayed=views,
                target="positive",
                top_k=0,
                engine=ENGINE,
                round=number,
                shard=0,
                num_shards=1,
            ),
            {REPLAYS: ([_replay(name, index, views) for name, index in keys], Replay)},
            {"num_tokens": 8, "mean_logprob": {view: -0.5 for view in views}},
            {"tokens_per_second": 400.0},
        )
        return rollouts, replays

    def _rollout(self, name: str, index: int) -> Rollout:
        text = HOSTILE if name == "hostile" else f"response {index}"
        half = len(text) // 2
        return Rollout(
            sample_id=name,
            index=index,
            policy="p",
            token_ids=(1, 2),
            logprobs=(-0.1, -0.2),
            text=text,
            tokens=(text[:half], text[half:]) if self.tokens else (),
            truncated=index == 1,
        )

    def _weight(self, number: int, name: str, index: int) -> Weight:
        if self.gate.kind == "contrastive":
            # Means: hostile 0.5 a round, grown as the others from round 3 on and less before, the others 0.125.
            mean = {"hostile": 0.5 * number, "grown": 0.125 + 0.1 * min(number - 3, 0)}.get(name, 0.125)
            spread = 0.5 if name == "hostile" else 0.125
            return Weight(
                sample_id=name, index=index, evidence_score=mean + spread * (-1) ** index, weights=(2.0 * (1 - index),)
            )
        if self.gate.kind == "prefix_trust":
            return Weight(sample_id=name, index=index, weights=(1.0, 0.5 - index * (0.4 if name == "hostile" else 0.1)))
        return Weight(sample_id=name, index=index, weights=(1.0,))

    def _criteria(self, number: int, policy: ArtifactRef) -> ArtifactRef:
        rollouts, replays = self._sampled(number + 1000, policy, held_out=True)
        summary = {
            "divergence": 0.5 / (number + 1),
            "divergence_se": 0.05,
            "support": -0.6 / (number + 1),
            "support_se": 0.06,
            "evidence_score": 0.1 * number,
            "evidence_score_se": None,
            "num_prompts": 2,
            "num_tokens": 8,
        }
        return self._put(CriteriaJob(rollouts=rollouts, replay=replays, round=number), {}, summary)

    def _select(self, criteria: list[ArtifactRef], chosen: int, last: int) -> ArtifactRef:
        summary = {
            "round": chosen,
            "rule": "The highest support.",
            "reason": f"Round {chosen} has the highest support.",
            "divergence_per_10_rounds": -0.1,
            "support_per_10_rounds": 0.1,
            "evidence_score_per_10_rounds": 0.1,
            "last_round": last,
        }
        return self._put(SelectJob(criteria=tuple(criteria)), {}, summary)

    def _evaluations(self, states: list[ArtifactRef], num_correct: tuple[int, ...], chosen: int) -> list[Evaluation]:
        if not num_correct:
            return []
        samples = [
            EvaluationSample(
                id=f"q{number:02}",
                image=self.image,
                question=HOSTILE if number == 6 else f"which letter is {number}?",
                answer="B" if number % 2 else "left",
                options=("one", HOSTILE, "three") if number % 2 else None,
                category="position" if number % 4 else HOSTILE,
                region=Box(4, 4, 8, 8) if number % 3 else None,
            )
            for number in range(NUM_QUESTIONS)
        ]
        # What it is made by does not matter here; the real stage is tested elsewhere.
        questions = self._put(
            ImportDataJob(source="questions", images="decode", max_image_pixels=1),
            {SAMPLES: (samples, EvaluationSample)},
            {"num_samples": NUM_QUESTIONS, "num_bad": 0},
        )
        numbers = dict.fromkeys((0, chosen, len(states) - 1))
        asked = [
            (f"student {number}", states[number], correct, "student")
            for number, correct in zip(numbers, (*num_correct, num_correct[-1] - 1), strict=False)
            if number == 0 or len(num_correct) > 1
        ]
        asked.append(("teacher <full>", self.teacher, 18, "teacher"))
        found = [(label, self._evaluate(samples, questions, *what)) for label, *what in asked]
        if self.with_crop:
            found.append(
                ("with crop", self._evaluate(samples, questions, self.student, 19, "student", crop=ViewConfig()))
            )
        return [Evaluation(label=label, benchmark="held-out", ref=ref) for label, ref in found]

    def _evaluate(
        self,
        samples: list[EvaluationSample],
        data: ArtifactRef,
        policy: ArtifactRef,
        num_correct: int,
        role: Role,
        crop: ViewConfig | None = None,
    ) -> ArtifactRef:
        keys = [(sample, seed) for seed in self.seeds for sample in samples]
        predictions = [
            Prediction(
                sample_id=sample.id,
                seed=seed,
                response=f"the answer is {HOSTILE if sample.id == 'q05' else 'left'}",
                num_tokens=4,
                truncated=False,
            )
            for sample, seed in keys
        ]
        scores = [
            Score(
                sample_id=sample.id,
                seed=seed,
                extracted=None
                if sample.id == "q07"
                else sample.answer
                if number % NUM_QUESTIONS < num_correct
                else "x",
                answer=sample.answer,
                correct=number % NUM_QUESTIONS < num_correct,
                problem=HOSTILE if sample.id == "q19" else None,
            )
            for number, (sample, seed) in enumerate(keys)
        ]
        how: dict[str, Any] = {
            "prompt": PROMPT,
            "choice_template": "{question}\n{options}",
            "generation": GenerationConfig(temperature=0.7 if len(self.seeds) > 1 else 0.0, seeds=self.seeds),
            "engine": ENGINE,
        }
        asked = {"benchmark": "held-out", "role": role, "policy": policy, "data": data, "crop": crop, **how}
        predicted = self._put(
            PredictJob(first=0, last=NUM_QUESTIONS, **asked),
            {PREDICTIONS: (predictions, Prediction)},
            {"num_questions": NUM_QUESTIONS, "num_tokens": 80, "truncated_share": 0.0},
            {"gpu_seconds": 2.0},
        )
        job = EvaluateJob(
            kind=self.kind,
            predictions=(predicted,),
            protocol=self.protocol,
            aggregate="rows",
            judge=None,
            **asked,
        )
        accuracy = num_correct / NUM_QUESTIONS
        # Wald's interval; what the real one is does not matter here.
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / NUM_QUESTIONS)
        low, high = max(0.0, accuracy - half), min(1.0, accuracy + half)
        category = {"accuracy": accuracy, "low": low, "high": high, "num_rows": 10}
        summary = {
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "method": "wilson" if len(self.seeds) == 1 else "bootstrap",
            "aggregate": "rows",
            "num_questions": NUM_QUESTIONS,
            "num_rows": NUM_QUESTIONS,
            "num_tokens": 80,
            "truncated_share": 0.0,
            "num_unanswered": 1,
            "num_problems": 1,
            "by_category": {HOSTILE: category, "position": category},
            "by_seed": {str(seed): accuracy for seed in self.seeds},
            "seed_spread": 0.02 if len(self.seeds) > 1 else None,
        }
        return self._put(job, {SCORES: (scores, Score)}, summary)


def _benchmarks(folder: Path) -> list[dict[str, Any]]:
    return [{"name": "own", "kind": "jsonl", "path": str(folder / "own.jsonl"), "judge": {"model": "m"}}]


def _source(folder: Path) -> dict[str, str]:
    return {"kind": "jsonl", "path": str(folder / "train.jsonl"), "evaluation_path": str(folder / "eval.jsonl")}


def _replay(name: str, index: int, views: tuple[str, ...]) -> Replay:
    # The hostile prompt's responses differ more, so that it stands first where nothing else is known.
    spread = 1.0 if name == "hostile" else 0.25
    logprobs = {f"logprobs_{view}": (-spread * (index + 1) * (1 + (view == "negative")), -0.25) for view in views}
    return Replay(sample_id=name, index=index, max_logprobs=(-0.1, -0.1), **logprobs)
