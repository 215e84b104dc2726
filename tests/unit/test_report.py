"""The report on runs that were never computed: their artefacts are written by hand."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.run_artifacts import HOSTILE, Run

from tasks.adapters.answers import changed_answers
from tasks.adapters.charts import Chart, Line, draw, drawable, format_value
from tasks.adapters.curves import overlaid, round_figures, selection_charts
from tasks.adapters.gallery import MAX_LEVEL, Gallery, choose_prompts, level_of, spaced, token_values
from tasks.adapters.origins import origins
from tasks.adapters.run_job import selected_round
from tasks.adapters.scoreboard import Scoreboard, accuracy_charts, scoreboards
from tasks.adapters.side_by_side import build_comparison, differences
from tasks.evaluation_config import VLMEvalKitProtocol
from vzero_core.config import Gate, GateConfig, NoGateConfig, PrefixTrustConfig, required_views

GATES: list[Gate] = [GateConfig(min_spread=1e-3), PrefixTrustConfig(floor=0.1), NoGateConfig()]
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"


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


def words(page: str) -> str:
    """The page's text, its white space made even."""
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_stage_writes_the_page_once(run: Run, page: str) -> None:
    ref = run.report()
    assert run.store.read(ref, "report.html").decode() == page
    assert run.report() == ref


def test_page_loads_and_runs_nothing(page: str) -> None:
    loads_nothing(page)


def loads_nothing(page: str) -> None:
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


def test_untrusted_text_is_shown_and_not_markup(run: Run, page: str) -> None:
    assert "<script" not in page
    assert "<img src=https" not in page
    # The prompt's question; of a held-out one the question, an option and both answers; a category; why a row is bad.
    assert page.count(ESCAPED) >= 6
    assert "teacher &lt;full&gt;" in page
    # Each half of a response is a token of its own.
    assert words(page).count("script&gt;alert(1)&lt;") >= 6


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


def test_data_summary(page: str) -> None:
    assert "of them, and 7 learned before</dd>" in page
    assert "<dt>asked, to compare checkpoints</dt><dd>5</dd>" in page
    assert "broken" in page, "the row that was set aside"
    assert "<dd>answer</dd>" in page, "the field that was never read"
    assert "image is in no evaluation data" in page
    assert "data_docs/" in page


def galleries(run: Run) -> dict[str, Gallery]:
    found = choose_prompts(run.store, run.dataset, run.job.rounds, views=run.views, gate=run.gate)
    return {gallery.title: gallery for gallery in found}


def test_best_and_worst_are_of_the_last_round_and_no_prompt_comes_twice(tmp_path: Path) -> None:
    # Round 1 asks plain and hostile, round 2 the last two, round 3 plain and hostile again: a mean evidence of 0.125
    # for plain and of 0.5 times the round for hostile.
    run = Run(tmp_path, num_rounds=3, names=("plain", "hostile", "third", "fourth"))
    (card,) = galleries(run)["Best"].cards[:1]
    assert (card.sample_id, [found.round for found in card.rounds]) == ("hostile", [3])
    assert card.rounds[0].mean == pytest.approx(1.5)
    shown = [card.sample_id for gallery in galleries(run).values() for card in gallery.cards]
    assert sorted(shown) == ["hostile", "plain"]


def test_what_changed_most_is_shown_early_and_late(tmp_path: Path) -> None:
    # Round 1 asks x to even, round 2 c to z, round 3 a to hostile. There hostile is best, all others are even: a is
    # best too and b and c are worst, by name. Of the two that are left, grown had 0.1 less in round 2.
    names = ("x", "y", "z", "a", "b", "even", "c", "grown", "hostile")
    run = Run(tmp_path, num_rounds=3, per_round=6, names=names, num_correct=())
    found = galleries(run)["Most changed"]
    assert [card.sample_id for card in found.cards] == ["grown", "even"]
    rounds = [[(one.round, round(one.mean, 6)) for one in card.rounds] for card in found.cards]
    assert rounds == [[(2, 0.025), (3, 0.125)], [(1, 0.125), (3, 0.125)]]
    assert "Round 2 mean +0.025" in words(run.page())


def test_responses_stand_by_weight(run: Run) -> None:
    for gallery in galleries(run).values():
        for card in gallery.cards:
            (found,) = card.rounds
            weights = [row.weight for row in found.responses]
            assert weights == sorted(weights, reverse=True)
            assert found.views == list(required_views(run.gate, "positive"))
            mean = {"hostile": -0.625}.get(card.sample_id, -0.25)
            assert found.responses[0].logprobs["positive"] == pytest.approx(mean)


def test_without_recurring_prompts_those_that_differ_most_are_shown(tmp_path: Path) -> None:
    # One prompt of two in each of the kinds before leaves the other round's for this one.
    run = Run(tmp_path, num_rounds=2)
    found = galleries(run)["Most different responses"]
    assert [(card.sample_id, card.rounds[0].round) for card in found.cards] == [("hostile", 1)]


def test_prompts_that_were_met_too_late_count_as_not_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounds 3 and 6 ask the last five; of these four are best and worst. Searched are rounds 1 and 2, which ask others.
    monkeypatch.setattr("tasks.adapters.gallery._EARLY_ROUNDS", 2)
    run = Run(tmp_path, num_rounds=6, names=tuple("abcdefghijklmno"), per_round=5, num_correct=())
    (card,) = galleries(run)["Most different responses"].cards
    assert (card.sample_id, card.rounds[0].round) == ("o", 6)


def test_boxes_are_scaled_from_their_own_frames(run: Run) -> None:
    card = galleries(run)["Best"].cards[0]
    # Image 40 x 20, its detail 80 x 40, the downsampled frame 20 x 10: one field of view.
    assert (card.region.x, card.region.y, card.region.width, card.region.height) == (10, 20, 10, 20)
    assert (card.positive_box.x, card.positive_box.y, card.positive_box.width) == (5, 10, 10)
    assert (card.negative_box.x, card.negative_box.y, card.negative_box.height) == (50, 0, 80)
    assert card.full.pixelated


@pytest.mark.parametrize(
    ("value", "step", "level"),
    [(0.2, 0.5, 0), (0.3, 0.5, 1), (-0.3, 0.5, -1), (1.9, 0.5, 4), (99.0, 0.5, MAX_LEVEL), (-3.2, 1.0, -3)],
)
def test_shades(value: float, step: float, level: int) -> None:
    assert level_of(value, step) == level


def test_tokens_are_shaded_by_the_gap_of_the_views_or_by_the_one_there_is() -> None:
    both = {"logprobs_positive": [-1.0, -2.0], "logprobs_negative": [-3.0, -1.5], "logprobs_none": None}
    assert token_values(both)[0] == [2.0, -0.5]
    alone = {"logprobs_positive": None, "logprobs_negative": None, "logprobs_none": [-3.0, -0.1]}
    assert token_values(alone)[0] == [-3.0, -0.1]


@pytest.mark.parametrize(
    ("text", "tokens", "shown"),
    [
        ("red d1 2", ("red", "d", "1", "2", "<eos>"), ["red", " d", "1", " 2", "<eos>"]),
        ("a red  dog", ("a", " red", " ", " dog"), ["a", " red", " ", " dog"]),
        (
            "caf\N{LATIN SMALL LETTER E WITH ACUTE} x",
            ("caf", "\ufffd", "\ufffd", " x"),
            ["caf", "\ufffd", "\ufffd", " x"],
        ),
        ("", ("<eos>", ""), ["<eos>", ""]),
    ],
)
def test_tokens_get_the_white_space_of_their_text(text: str, tokens: tuple[str, ...], shown: list[str]) -> None:
    assert list(spaced(text, tokens)) == shown


def test_every_token_is_in_the_page_with_its_own_shade(tmp_path: Path) -> None:
    # d of the first token: log-probs -0.25 (i + 1) and twice that, so 0.25 (i + 1): a shade and none; of the last: 0.
    page = Run(tmp_path, names=("plain", "other"), num_rounds=1).page()
    assert '<i title="+0.25">respo</i><i title="+0.00">nse 0</i>' in page
    assert '<i class="p1" title="+0.50">respo</i><i title="+0.00">nse 1</i>' in page


def test_rollouts_of_an_earlier_version_are_shown_without_shades(tmp_path: Path) -> None:
    page = Run(tmp_path, tokens=False).page()
    assert ">response 0</div>" in page
    assert "<i title" not in page


def test_missing_images_are_said_to_be_and_the_page_is_built(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before = run.page()
    assert "cannot be read" not in before
    (tmp_path / "full.png").unlink()
    page = run.page()
    # Four prompts; six questions, three that became right and three that became wrong.
    assert page.count("The image cannot be read") == before.count('alt="full image"') > 4
    assert page.count('alt="relevant crop"') == before.count('alt="relevant crop"'), "crops lie in the store"


def test_a_changed_image_is_not_shown(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "full.png").write_bytes((tmp_path / "full.png").read_bytes() + b"x")
    assert 'alt="full image"' not in run.page()


# --- scores ---------------------------------------------------------------------------------------------------------


def board_of(run: Run) -> Scoreboard:
    (board,) = scoreboards(run.job, run.store)
    return board


def test_better_is_called_better(tmp_path: Path) -> None:
    # 10 of 20 became right and none wrong: McNemar's exact p is 2 / 2^10.
    run = Run(tmp_path, num_correct=(5, 15))
    after = board_of(run).after
    assert after is not None
    assert after.comparison is not None
    assert (after.comparison.num_gained, after.comparison.num_lost) == (10, 0)
    assert after.comparison.p_value == pytest.approx(2 / 2**10)
    text = words(run.page())
    assert "held-out: 25.0% before, 75.0% after." in text
    assert "The student got better (+50.0 points" in text
    assert "10 answers became right and 0 became wrong (exact McNemar test, p&nbsp;= 0.002)" in text


def test_chance_is_called_noise(tmp_path: Path) -> None:
    # 3 became right and none wrong: p = 2 / 2^3.
    text = words(Run(tmp_path, num_correct=(8, 11)).page())
    assert "Inside the noise: this does not show that the student changed (+15.0 points" in text
    assert "p&nbsp;= 0.250" in text
    assert "got better" not in text


def test_worse_is_called_worse(tmp_path: Path) -> None:
    page = Run(tmp_path, num_correct=(18, 4)).page()
    assert 'class="verdict worse"' in page
    assert "The student got worse" in page


def test_the_chosen_student_is_the_one_after_and_the_last_stands_beside_it(tmp_path: Path) -> None:
    run = Run(tmp_path, num_correct=(5, 15), num_rounds=3, chosen=2)
    assert selected_round(run.job, run.store) == 2
    board = board_of(run)
    assert [row.found.round for row in board.rows] == [0, 2, 3, None]
    assert [row.found.label for row in board.rows] == ["student 0", "student 2", "student 3", "teacher <full>"]
    assert board.after is board.rows[1] or board.after == board.rows[1]
    text = words(run.page())
    assert "its state after round 2 was chosen" in text
    assert "held-out: 25.0% before, 75.0% after." in text, "not the last one's 70%"
    assert "Round 2 has the highest support." in text


def test_what_the_student_answers_with_the_crop_is_a_reference(tmp_path: Path) -> None:
    board = board_of(Run(tmp_path, with_crop=True))
    assert [found.accuracy for found in board.student] == [0.25, 0.75]
    assert [row.found.label for row in board.rows] == ["student 0", "student 2", "teacher <full>", "with crop"]


def test_without_a_choice_the_last_student_is_the_one_after(tmp_path: Path) -> None:
    run = Run(tmp_path, num_rounds=3)
    assert selected_round(run.job, run.store) == 3
    assert [row.found.round for row in board_of(run).rows] == [0, 3, None]
    assert "Choosing the checkpoint" not in run.page()


def test_other_protocols_are_not_compared(tmp_path: Path) -> None:
    run = Run(tmp_path)
    other = Run(tmp_path, name="other", protocol=VLMEvalKitProtocol())
    mixed = run.job.model_copy(update={"evaluations": (run.job.evaluations[0], *other.job.evaluations[1:])})
    (board,) = scoreboards(mixed, run.store)
    assert board.after is not None
    assert board.after.comparison is None
    assert list(changed_answers(run.store, [board], run.benchmarks)) == []


def test_run_without_evaluation_says_so(tmp_path: Path) -> None:
    page = Run(tmp_path, NoGateConfig(), num_correct=(), num_rounds=1).page()
    assert "No accuracy was measured" in page
    assert ">Accuracy" not in page
    assert "trained for 1 round without" in words(page)


def test_run_measured_once_has_no_after(tmp_path: Path) -> None:
    page = Run(tmp_path, num_correct=(5,)).page()
    assert "no before and after" in page
    assert "Answers before and after" not in page


def test_spread_of_seeds_and_failures_of_the_judge_are_said(tmp_path: Path) -> None:
    text = words(Run(tmp_path, seeds=(1, 2)).page())
    assert "± 2.0 over 2 seeds" in text
    assert "each question answered with 2 seeds" in text
    assert "no verdict of the judge and count as wrong: student 0 1, student 2 1" in text
    assert "over 1 seeds" not in words(Run(tmp_path, name="one").page())


def test_published_figures_are_marked_and_stand_apart(tmp_path: Path) -> None:
    assert "Published figures" not in Run(tmp_path / "own").page()
    page = Run(tmp_path / "vstar", kind="vstar").page()
    assert "Published figures, for reference" in page
    assert "Nothing of it was measured by this run" in " ".join(page.split())
    assert "89.0%" in page.split("<aside")[1].split("</aside>")[0]
    assert "89.0%" not in re.sub(r"<aside.*?</aside>", "", page, flags=re.DOTALL)


def test_answers_that_changed_are_shown_with_both(tmp_path: Path) -> None:
    run = Run(tmp_path, num_correct=(5, 15))
    (found,) = changed_answers(run.store, scoreboards(run.job, run.store), run.benchmarks)
    assert (found.num_gained, found.num_lost) == (10, 0)
    assert [card.sample.id for card in found.gained] == ["q05", "q06", "q07"]
    card = found.gained[0]
    assert (card.before.correct, card.after.correct) == (False, True)
    assert HOSTILE in card.after.text
    assert card.region is not None
    assert found.gained[1].region is None, "6 has none"
    lost = Run(tmp_path / "worse", num_correct=(15, 5))
    (found,) = changed_answers(lost.store, scoreboards(lost.job, lost.store), {})
    assert (found.num_gained, found.num_lost) == (0, 10)
    assert all(card.full is None for card in found.lost), "nobody reads this benchmark's images"


def test_a_question_with_several_seeds_is_shown_once(tmp_path: Path) -> None:
    run = Run(tmp_path, seeds=(1, 2))
    (found,) = changed_answers(run.store, scoreboards(run.job, run.store), run.benchmarks)
    assert found.num_gained == 20
    assert [(card.sample.id, card.seed) for card in found.gained] == [("q05", 1), ("q06", 1), ("q07", 1)]


# --- curves and costs -----------------------------------------------------------------------------------------------


def test_criteria_are_drawn_with_their_errors_and_the_choice(tmp_path: Path) -> None:
    run = Run(tmp_path, num_rounds=3, chosen=2)
    support, divergence, evidence = selection_charts(run.store, run.job.criteria, 2)
    assert support.lines[0].values == (-0.6, -0.3, pytest.approx(-0.2), -0.15)
    (line,) = divergence.lines
    assert line.rounds == (0, 1, 2, 3)
    assert line.values == (0.5, 0.25, pytest.approx(1 / 6), 0.125)
    # Two prompts' standard error of 0.05, 1.96 of it to either side.
    assert line.intervals[1] == (pytest.approx(0.25 - 0.098), pytest.approx(0.25 + 0.098))
    assert evidence.lines[0].intervals[3] == (pytest.approx(0.3), pytest.approx(0.3)), "no error is known"
    assert divergence.marked == 2
    with_line, without = draw(divergence, 3), draw(Chart("Divergence", "", divergence.lines), 3)
    assert len(with_line) > len(without)
    (accuracy,) = accuracy_charts(scoreboards(run.job, run.store))
    assert (accuracy.lines[0].rounds, accuracy.marked) == ((0, 2, 3), 2)


def test_cost_is_that_of_all_artefacts_behind_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, num_rounds=3, chosen=2)
    found = origins(run.job, run.store)
    counts = {stage: cost.num_artifacts for stage, cost in found.costs.items()}
    # Three rounds and four candidates are sampled; four models are measured.
    assert (counts["rollouts"], counts["train"], counts["criteria"], counts["predict"]) == (7, 3, 4, 4)
    assert (counts["view_shard"], counts["select"], counts["data_docs"]) == (4, 1, 1)
    assert "checkpoint" not in counts, "its time is that of its training"
    assert (found.costs["rollouts"].num_tokens, found.costs["train"].num_tokens) == (7 * 8, 3 * 8)
    assert found.costs["predict"].gpu_seconds == 4 * 2.0
    assert found.costs["rollouts"].gpu_seconds is None
    assert found.total.seconds == pytest.approx(sum(cost.seconds for cost in found.costs.values()))


def test_cost_of_a_round_is_that_of_its_own_artefacts(tmp_path: Path) -> None:
    run = Run(tmp_path, num_rounds=1)
    (done,) = run.job.rounds
    figures = round_figures(run.store, 1, done.rollouts, done.replays, done.gate, done.train)
    manifests = [run.store.manifest(ref) for ref in done.refs()]
    assert figures["wall_seconds"] == sum(manifest.measured["seconds"] for manifest in manifests)
    assert figures["cpu_seconds"] == sum(manifest.measured["cpu_seconds"] for manifest in manifests)
    assert figures["gpu_seconds"] is None


# --- two runs -------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    first = Run(tmp_path, name="first", num_correct=(5, 10))
    second = Run(tmp_path, NoGateConfig(), name="second", num_correct=(5, 18))
    page = build_comparison(first.job, second.job, first.store)
    loads_nothing(page)
    assert build_comparison(first.job, second.job, first.store) == page
    text = words(page)
    # 8 of 20 became right from one chosen student to the other.
    assert "second is better than first (+40.0 points" in text
    assert "8 answers became right and 0 became wrong" in text
    assert "first, chosen 50.0%" in text
    assert "second, chosen 90.0%" in text
    back = words(build_comparison(second.job, first.job, first.store))
    assert "first is worse than second (−40.0 points" in back  # noqa: RUF001


def test_two_runs_with_other_questions_are_shown_but_not_compared(tmp_path: Path) -> None:
    first = Run(tmp_path, name="first")
    second = Run(tmp_path, name="second", protocol=VLMEvalKitProtocol())
    text = words(build_comparison(first.job, second.job, first.store))
    assert "Not comparable" in text
    assert "points" not in text
    assert "second, chosen 75.0%" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = Run(tmp_path, num_rounds=1), Run(tmp_path, num_rounds=2)
    page = build_comparison(first.job, second.job, first.store)
    assert f"a-run, {first.job.key[:8]} and a-run, {second.job.key[:8]}" in words(page)
    loads_nothing(page)


def test_a_run_that_measured_nothing_can_stand_beside_one_that_did(tmp_path: Path) -> None:
    first, second = Run(tmp_path, name="first", num_correct=()), Run(tmp_path, name="second")
    text = words(build_comparison(first.job, second.job, first.store))
    assert "No benchmark was measured in both runs." in text
    assert "Measured in one of the runs only: held-out." in text


def test_curves_are_overlaid_line_by_line() -> None:
    one = Chart("Speed", "u", (Line("a", (1,), (1.0,)), Line("b", (1,), (2.0,))), levels=(("l", 1.0),))
    other = Chart("Speed", "u", (Line("b", (1,), (3.0,)), Line("c", (1,), (4.0,))))
    (chart,) = overlaid([one, Chart("Alone", "", (Line("a", (1,), (1.0,)),))], [other], ("x", "y"))
    assert chart.title == "Speed: b"
    assert [(line.label, line.values) for line in chart.lines] == [("x", (2.0,)), ("y", (3.0,))]
    assert chart.levels == ()


def test_settings_that_differ() -> None:
    first = {"seed": 0, "gate": {"kind": "off"}, "list": [{"n": 1}], "same": {"x": 1}, "empty": {}}
    second = {"seed": 1, "gate": {"kind": "contrastive", "alpha": 1.0}, "list": [{"n": 2}], "same": {"x": 1}}
    assert list(differences(first, second)) == [
        ("empty", "{}", "\N{EN DASH}"),
        ("gate.alpha", "\N{EN DASH}", "1.0"),
        ("gate.kind", '"off"', '"contrastive"'),
        ("list.0.n", "1", "2"),
        ("seed", "0", "1"),
    ]


# --- charts ---------------------------------------------------------------------------------------------------------


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


def test_large_numbers_at_an_axis_are_written_out() -> None:
    svg = draw(Chart("Large", "", (Line("a", (1, 2), (1000.0, 40_000.0)),), logarithmic=True), 2)
    assert ">30,000</text>" in svg
    assert "e+" not in svg


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
