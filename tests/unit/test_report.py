"""The report on a run of two rounds that was never computed: its artefacts are written by hand."""

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tasks.adapters.charts import Chart, Line, draw, drawable, format_value
from tasks.adapters.dataset import QUARANTINE, SAMPLES, VIEW_SHARDS, Dataset, SampleViews, ViewShard, to_png, views_file
from tasks.adapters.gallery import PromptCard, choose_prompts
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Outcome, Store, write_json
from tasks.adapters.tables import write_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS, WEIGHTS, CheckpointJob, TrainJob
from tasks.artifacts import ArtifactRef, BadRow, Job, Prediction, Replay, Role, Rollout, Sample, Weight
from tasks.build_views import ViewShardJob, ViewsJob
from tasks.check_models import CheckModelsJob, ModelJob
from tasks.config import EngineFingerprint, OptimizerConfig, PromptConfig, SamplingConfig
from tasks.evaluate import PREDICTIONS, EvaluateJob, wilson_interval
from tasks.evaluation_data import EvaluationDataJob
from tasks.gate import GateJob
from tasks.import_data import ImportDataJob
from tasks.replay import ReplayJob
from tasks.report import Evaluation, ReportJob, RoundRefs, build_page, change_of, measurements, report
from tasks.rollouts import RolloutsJob
from tasks.validate import ValidateJob
from vzero_core.config import (
    Gate,
    GateConfig,
    NoGateConfig,
    PolicyGradientLoss,
    PrefixTrustConfig,
    ViewConfig,
    required_views,
)
from vzero_core.views import Box

HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x.png onerror=alert(2)>"
GATES: list[Gate] = [GateConfig(min_spread=1e-3), PrefixTrustConfig(floor=0.1), NoGateConfig()]
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


class Run:
    """Writes the artefacts of a run."""

    def __init__(self, folder: Path, gate: Gate, num_correct: tuple[int, ...] = (5, 15), num_rounds: int = 2) -> None:
        self.store = Store(str(folder / "store"), folder / "work")
        self.gate = gate
        self.student, self.teacher = self._model("student"), self._model("teacher")
        self._data(folder)
        self.dataset = Dataset(self.store, ImageReader(str(folder), 10**6))
        rounds = []
        for number in range(1, num_rounds + 1):
            rounds.append(self._round(number, rounds[-1].train if rounds else self.student))
        policies = [self.student, rounds[-1].train]
        questions = self._put(
            EvaluationDataJob(
                source="q",
                models=ArtifactRef(stage="check_models", key="k", digest="d"),
                max_image_pixels=1,
                prompt=PROMPT,
                max_new_tokens=8,
            ),
            {},
            {"num_samples": NUM_QUESTIONS, "num_bad": 0},
        )
        evaluations = [
            Evaluation(label=f"student {number}", ref=self._evaluate(policy, questions, correct, "student"))
            for number, (policy, correct) in enumerate(zip(policies, num_correct, strict=False))
        ]
        if num_correct:
            ref = self._evaluate(self.teacher, questions, 18, "teacher")
            evaluations.append(Evaluation(label="teacher <full>", ref=ref))
        self.job = ReportJob(
            name="a-run",
            config={"name": "a-run", "note": HOSTILE},
            samples=self.samples,
            views=self.views,
            rounds=tuple(rounds),
            evaluations=tuple(evaluations),
            selected=self._put(
                CheckpointJob(train_key=rounds[-1].train.key), {}, {"weights": "w" * 32, "num_updates": 4}
            ),
        )

    def page(self) -> str:
        return build_page(self.job, self.store, Dataset(self.store, self.dataset.images))

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

    def _data(self, folder: Path) -> None:
        images = ImageReader(str(folder), 10**6)
        Image.effect_noise((40, 20), 50).convert("RGB").save(folder / "full.png")
        samples = [
            Sample(
                id=name, image=images.inspect("full.png", decode=True).ref, question=question, region=Box(4, 4, 8, 8)
            )
            for name, question in (("plain", "what colour?"), ("hostile", HOSTILE))
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
        self.samples = self._put(
            ValidateJob(
                rows=self._put(ImportDataJob(source="s", images="decode", max_image_pixels=10**6), {}, {}),
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
            {SAMPLES: (samples, Sample), QUARANTINE: (bad, BadRow)},
            {
                "num_samples": 2,
                "num_bad": 1,
                "num_clipped": 1,
                "dropped_fields": ["answer"],
                "bad": [],
                "unchecked": [],
            },
        )
        shards = [
            self._put(
                ViewShardJob(samples=self.samples, views=ViewConfig(), seed=0, shard=shard, num_shards=2),
                {SAMPLES: (samples[shard:][:1], Sample), views_file(0): (views[shard:][:1], SampleViews)},
                {"num_samples": 1, "num_bad": 0},
            )
            for shard in range(2)
        ]
        rows = [ViewShard(ref=shard, num_samples=1).model_dump() for shard in shards]
        self.views = self._put(
            ViewsJob(shards=tuple(shards), max_bad_share=0.5),
            {SAMPLES: (samples, Sample), QUARANTINE: ([], BadRow)},
            {"num_samples": 2, "num_bad": 0},
            files={VIEW_SHARDS: rows},
        )

    def _round(self, number: int, policy: ArtifactRef) -> RoundRefs:
        keys = [(name, index) for name in ("plain", "hostile") for index in range(2)]
        rollouts = self._put(
            RolloutsJob(
                policy=policy,
                views=self.views,
                prompt=PROMPT,
                sampling=SamplingConfig(num_responses=2),
                engine=ENGINE,
                seed=0,
                round=number,
                prompts_per_round=2,
                shard=0,
                num_shards=1,
            ),
            {ROLLOUTS: ([_rollout(name, index) for name, index in keys], Rollout)},
            {"num_responses": 4, "num_tokens": 8, "mean_length": 2.0, "truncated_share": 0.25},
            {"tokens_per_second": 100.0},
        )
        views = required_views(self.gate, "positive")
        replays = self._put(
            ReplayJob(
                teacher=self.teacher,
                rollouts=rollouts,
                views=self.views,
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
        gate = self._put(
            GateJob(replays=(replays,), gate=self.gate, target="positive", round=number),
            {WEIGHTS: ([_weight(name, index, self.gate) for name, index in keys], Weight)},
            GATE_SUMMARIES[self.gate.kind],
        )
        job = TrainJob(
            policy=policy,
            samples=self.views,
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
        train = self._put(job, {}, {**summary, "num_updates": 2 * number})
        return RoundRefs(round=number, rollouts=(rollouts,), replays=(replays,), gate=gate, train=train)

    def _evaluate(self, policy: ArtifactRef, data: ArtifactRef, num_correct: int, role: Role) -> ArtifactRef:
        rows = [
            Prediction(
                sample_id=str(number),
                response="",
                extracted=None,
                answer="",
                correct=number < num_correct,
                truncated=False,
            )
            for number in range(NUM_QUESTIONS)
        ]
        low, high = wilson_interval(num_correct, NUM_QUESTIONS)
        job = EvaluateJob(
            role=role,
            policy=policy,
            data=data,
            crop=None,
            prompt=PROMPT,
            answer_pattern="(.*)",
            max_new_tokens=1,
            engine=ENGINE,
        )
        accuracy = num_correct / NUM_QUESTIONS
        figures = {"accuracy": accuracy, "low": low, "high": high, "num_questions": NUM_QUESTIONS}
        return self._put(job, {PREDICTIONS: (rows, Prediction)}, {**figures, "truncated_share": 0.0})


def _rollout(name: str, index: int) -> Rollout:
    text = HOSTILE if name == "hostile" else f"response {index}"
    return Rollout(
        sample_id=name,
        index=index,
        policy="p",
        token_ids=(1, 2),
        logprobs=(-0.1, -0.2),
        text=text,
        truncated=index == 1,
    )


def _replay(name: str, index: int, views: tuple[str, ...]) -> Replay:
    # The hostile prompt's responses differ more, so that it stands first.
    spread = 1.0 if name == "hostile" else 0.25
    logprobs = {f"logprobs_{view}": (-spread * (index + 1), -0.25) for view in views}
    return Replay(sample_id=name, index=index, max_logprobs=(-0.1, -0.1), **logprobs)


def _weight(name: str, index: int, gate: Gate) -> Weight:
    if gate.kind == "contrastive":
        score = (0.5 if name == "hostile" else 0.125) * (-1) ** index
        return Weight(sample_id=name, index=index, evidence_score=score, weights=(2.0 * (1 - index),))
    if gate.kind == "prefix_trust":
        return Weight(sample_id=name, index=index, weights=(1.0, 0.5 - index * (0.4 if name == "hostile" else 0.1)))
    return Weight(sample_id=name, index=index, weights=(1.0,))


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.styles = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data


@pytest.fixture(scope="module", params=GATES, ids=lambda gate: gate.kind)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return run.page()


def test_stage_writes_the_page_once(run: Run, page: str) -> None:
    context: Any = SimpleNamespace(store=run.store, dataset=run.dataset)
    ref = report.fn(run.job, context)
    assert run.store.read(ref, "report.html").decode() == page
    assert report.fn(run.job, context) == ref


def test_page_loads_and_runs_nothing(page: str) -> None:
    elements = Elements(page)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
        references = re.findall(r"url\(([^)]*)\)", " ".join(filter(None, attributes.values())))
        assert all(reference.startswith("#") for reference in references)
    assert "url(" not in elements.styles
    assert "@import" not in elements.styles
    assert "default-src 'none'" in page


def test_untrusted_text_is_shown_and_not_markup(page: str) -> None:
    assert "<script" not in page
    assert "<img src=https" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2 * 3, "question and both responses, two rounds"
    assert "teacher &lt;full&gt;" in page


def test_page_is_small_and_the_same_every_time(run: Run, page: str) -> None:
    assert run.page() == page
    assert len(page) < 500_000


def test_ids_of_charts_do_not_collide(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_gate_section_says_what_the_gate_is(run: Run, page: str) -> None:
    shown = {
        "contrastive": ("Contrastive evidence gate", "Score spread within groups", "Weights at the bounds"),
        "prefix_trust": ("Prefix trust", "Mean token weight"),
        "off": ("plain distillation",),
    }
    for kind, texts in shown.items():
        assert all((text in page) == (kind == run.gate.kind) for text in texts)
    assert ('data-label="evidence"' in page) == (run.gate.kind == "contrastive")
    # Never defined in this run, so there is nothing to draw.
    assert "Weight and response length" not in page


def test_headline_and_data_summary(page: str) -> None:
    assert "answers 75.0% of 20 held-out questions" in " ".join(page.split())
    assert "The intervals do not overlap" in page
    assert "by\n50.0 points" in page
    assert "broken" in page, "the row that was set aside"
    assert "<dd>answer</dd>" in page, "the field that was never read"


def first_cards(run: Run, count: int) -> list[PromptCard]:
    first = run.job.rounds[0]
    return choose_prompts(
        run.store,
        run.dataset,
        round_number=1,
        views=run.views,
        rollouts=first.rollouts,
        replays=first.replays,
        weights=first.gate,
        gate=run.gate,
        count=count,
    )


def test_prompts_that_differ_most_come_first(run: Run) -> None:
    cards = first_cards(run, 2)
    assert [card.sample_id for card in cards] == ["hostile", "plain"]
    assert cards[0].spread == pytest.approx({"contrastive": 0.5, "prefix_trust": 0.1, "off": 0.25}[run.gate.kind])
    assert [row.weight for row in cards[0].responses] == sorted(
        (row.weight for row in cards[0].responses), reverse=True
    )
    assert cards[0].views == list(required_views(run.gate, "positive"))
    assert cards[0].responses[0].logprobs["positive"] == pytest.approx(-0.625)


def test_boxes_are_scaled_from_their_own_frames(run: Run) -> None:
    (card,) = first_cards(run, 1)
    # Image 40 x 20, its detail 80 x 40, the downsampled frame 20 x 10: one field of view.
    assert (card.region.x, card.region.y, card.region.width, card.region.height) == (10, 20, 10, 20)
    assert (card.positive_box.x, card.positive_box.y, card.positive_box.width) == (5, 10, 10)
    assert (card.negative_box.x, card.negative_box.y, card.negative_box.height) == (50, 0, 80)
    assert card.full.pixelated


def test_change_counts_questions_and_tests_the_sign(tmp_path: Path) -> None:
    run = Run(tmp_path, NoGateConfig(), num_correct=(8, 11))
    measured = measurements(run.job, run.store)
    assert [found.round for found in measured] == [0, 2, None]
    change = change_of(measured, run.store)
    assert change is not None
    assert (change.num_gained, change.num_lost, change.overlap) == (3, 0, True)
    assert change.p_value == 2 / 2**3
    assert "The intervals overlap" in run.page()


def test_worse_is_called_worse(tmp_path: Path) -> None:
    page = Run(tmp_path, NoGateConfig(), num_correct=(18, 4)).page()
    assert 'class="verdict worse"' in page
    assert "student got worse" in " ".join(page.split())


def test_run_without_evaluation_says_so(tmp_path: Path) -> None:
    page = Run(tmp_path, NoGateConfig(), num_correct=(), num_rounds=1).page()
    assert "No accuracy was measured" in page
    assert ">Accuracy<" not in page
    assert "trained for 1 round without" in " ".join(page.split())


def test_chart_holds_nothing_of_its_maker() -> None:
    chart = Chart("Title", "unit", (Line("a", (1, 2, 3), (1.0, None, -2.0)),), levels=(("b", 0.5),))
    svg = draw(chart, 3)
    assert draw(chart, 3) == svg
    assert svg.startswith('<svg viewBox="0 0 ')
    assert "http" not in svg
    assert "<style" not in svg
    assert "#0" not in re.sub(r"url\(#\w+\)", "", svg).replace('href="#', ""), "all colours are the page's"
    assert "var(--line-1)" in svg


@pytest.mark.parametrize(
    ("value", "logarithmic"), [(0.0, False), (5.0, False), (1e-7, False), (-3.0, False), (5.0, True), (180.0, True)]
)
def test_flat_line_gets_an_axis(value: float, *, logarithmic: bool) -> None:
    svg = draw(Chart("Flat", "", (Line("a", (1,), (value,)),), logarithmic=logarithmic), 1)
    assert svg.count("</text>") >= 3


def test_what_has_no_value_is_not_drawn() -> None:
    nothing, something = Line("a", (1, 2), (None, None)), Line("b", (1, 2), (None, 1.0))
    (left,) = drawable([Chart("1", "", (nothing,)), Chart("2", "", (nothing, something))])
    assert left.lines == (something,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (3, "3"),
        (0.22, "0.220"),
        (183.0, "183"),
        (12345.6, "12,346"),
        (-1.5, "\N{MINUS SIGN}1.50"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, text: str) -> None:
    assert format_value(value) == text
