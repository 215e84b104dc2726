"""A few prompts of a run as a person can judge them: pictures, boxes, responses token by token, scores, weights."""

import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.adapters.dataset import Dataset, by_id, open_png
from tasks.adapters.pictures import Picture, Rectangle, full_picture, picture, rectangle
from tasks.adapters.run_job import RoundRefs
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS, WEIGHTS
from tasks.artifacts import ArtifactRef, Sample, Weight
from vzero_core.config import Gate, GateConfig, PrefixTrustConfig, View

CARDS = 2
"""Prompts of each kind: best, worst, most changed."""
_MAX_CROP_SIDE = 280
_MAX_TEXT = 10_000
"""Characters of a response that are shown; more than responses of the usual length have."""
_MAX_TOKENS = 400
"""Tokens of a response that are shaded; each takes some forty bytes of the page."""
_EARLY_ROUNDS = 8
"""Rounds that are searched for prompts of the last one; their replays are read whole."""
MAX_LEVEL = 4
"""Shades to either side."""
GAP_STEP, LOGPROB_STEP = 0.5, 1.0
"""Nats a shade."""
_GAP_VIEWS: tuple[View, View] = ("positive", "negative")

_Group = dict[str, list["Response"]]


@dataclass(frozen=True)
class Token:
    """A token and what the teacher says of it, nats."""

    text: str
    value: float
    level: int
    """From -MAX_LEVEL to MAX_LEVEL; 0 is not shaded."""


@dataclass(frozen=True)
class Response:
    """One response and what teacher and gate say of it; None where the run did not ask."""

    index: int
    whole_text: str
    token_texts: Sequence[str]
    """Empty where the artefact has none."""
    token_values: Sequence[float]
    step: float
    """Nats a shade."""
    truncated: bool
    logprobs: dict[View, float | None]
    evidence_score: float | None
    weight: float
    """Mean over tokens where each has its own."""

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.token_values)

    @property
    def text(self) -> str:
        """What is shown where tokens have no texts."""
        return self.whole_text[:_MAX_TEXT]

    @property
    def tokens(self) -> list[Token]:
        """What is shown, each token with its shade."""
        texts = list(spaced(self.whole_text, self.token_texts[:_MAX_TOKENS]))
        shown = zip(texts, self.token_values, strict=False)
        return [Token(text, value, level_of(value, self.step)) for text, value in shown]

    @property
    def left_out(self) -> str:
        """Say how much is not shown."""
        if self.token_texts:
            return f"{count:,} more tokens" if (count := self.num_tokens - _MAX_TOKENS) > 0 else ""
        return f"{count:,} more characters" if (count := len(self.whole_text) - _MAX_TEXT) > 0 else ""

    @property
    def known_scores(self) -> list[float]:
        """Evidence score and log-probs, those that there are, the evidence score first."""
        return [value for value in (self.evidence_score, *self.logprobs.values()) if value is not None]


@dataclass(frozen=True)
class RoundResponses:
    """Responses to a prompt in one round, the heaviest first."""

    round: int
    mean: float
    """Of what prompts are chosen by (`measure_of`)."""
    responses: tuple[Response, ...]

    @property
    def views(self) -> list[View]:
        """The views that were replayed."""
        return [view for view in get_args(View) if any(row.logprobs[view] is not None for row in self.responses)]


@dataclass(frozen=True)
class PromptCard:
    """One prompt with all of its responses, in one round or in two."""

    sample_id: str
    question: str
    full: Picture | None
    positive: Picture
    negative: Picture
    region: Rectangle | None
    positive_box: Rectangle | None
    negative_box: Rectangle | None
    rounds: tuple[RoundResponses, ...]


@dataclass(frozen=True)
class Gallery:
    """Prompts under a heading."""

    title: str
    note: str
    cards: tuple[PromptCard, ...]


def measure_of(gate: Gate) -> str:
    """Say what prompts are chosen by."""
    if isinstance(gate, GateConfig):
        return "evidence score, nats per token"
    return "token weight" if isinstance(gate, PrefixTrustConfig) else "log-prob by the teacher, nats per token"


def choose_prompts(
    store: Store, dataset: Dataset, rounds: Sequence[RoundRefs], *, views: ArtifactRef, gate: Gate
) -> list[Gallery]:
    """Give the best and the worst prompts of the last round, and those that changed most since they were met first.

    Where no prompt of the last round was met early, those are given whose responses differ most, early and late.
    """
    samples = by_id(dataset.samples(views))
    last, latest = rounds[-1], _read_round(store, rounds[-1])
    # Below one pass over the data no prompt comes twice.
    recur = len(rounds) * len(latest) > len(samples)
    # Of early rounds, those prompts alone are read that came again: whole rounds would fill memory.
    only = set(latest) if recur else None
    early = {done.round: _read_round(store, done, only) for done in rounds[:-1][: _EARLY_ROUNDS if recur else 1]}
    met: dict[str, int] = {}
    for number, group in early.items():
        for name in group.keys() & latest.keys():
            met.setdefault(name, number)

    def mean(responses: Sequence[Response]) -> float:
        return statistics.fmean(_measure(row, gate) for row in responses)

    def spread(responses: Sequence[Response]) -> float:
        return statistics.pstdev(_measure(row, gate) for row in responses)

    def card(name: str, *numbers: int) -> PromptCard:
        found = {**early, last.round: latest}
        responses = tuple(
            RoundResponses(number, mean(found[number][name]), tuple(sorted(found[number][name], key=_order)))
            for number in numbers
        )
        return _card(dataset, views, *samples[name], rounds=responses)

    shown: set[str] = set()

    def pick(names: Iterable[str], key: Callable[[str], float], count: int = CARDS) -> list[str]:
        left = sorted(set(names) - shown, key=lambda name: (-key(name), name))[:count]
        shown.update(left)
        return left

    measure = measure_of(gate)
    best = [card(name, last.round) for name in pick(latest, lambda name: mean(latest[name]))]
    worst = [card(name, last.round) for name in pick(latest, lambda name: -mean(latest[name]))]
    groups = [
        Gallery("Best", f"Of the last round, the prompts with the highest mean {measure}.", tuple(best)),
        Gallery("Worst", f"Of the last round, those with the lowest mean {measure}.", tuple(worst)),
    ]
    if met:
        changed = pick(met, lambda name: abs(mean(latest[name]) - mean(early[met[name]][name])))
        note = f"The same prompt early and late, by how much it changed in mean {measure}."
        groups.append(Gallery("Most changed", note, tuple(card(name, met[name], last.round) for name in changed)))
    else:
        rest = {last.round: latest} if recur else {**early, last.round: latest}
        apart = []
        for number, group in rest.items():
            own = pick(group, lambda name, group=group: spread(group[name]), CARDS // len(rest))  # type: ignore[misc]
            apart += [card(name, number) for name in own]
        note = f"No prompt of the last round came in the first ones; by how much responses differ in {measure}."
        groups.append(Gallery("Most different responses", note, tuple(apart)))
    return [group for group in groups if group.cards]


def _read_round(store: Store, done: RoundRefs, only: set[str] | None = None) -> _Group:
    """Read the responses of a round by prompt, or of some prompts only."""
    weighed = {(row.sample_id, row.index): row for row in read_rows(store.read(done.gate, WEIGHTS), Weight)}
    names = ["sample_id", "index", *(f"logprobs_{view}" for view in get_args(View))]
    replayed = {(row["sample_id"], row["index"]): row for row in _columns(store, done.replays, REPLAYS, names, only)}
    groups: _Group = defaultdict(list)
    for row in _columns(store, done.rollouts, ROLLOUTS, ["sample_id", "index", "text", "tokens", "truncated"], only):
        key = row["sample_id"], row["index"]
        groups[row["sample_id"]].append(_response(row, replayed[key], weighed[key]))
    return groups


def _columns(
    store: Store, refs: Iterable[ArtifactRef], file: str, names: list[str], only: set[str] | None
) -> Iterator[dict[str, Any]]:
    for ref in refs:
        # Column by column: the top-k lists beside them are a hundred times their size.
        table = pq.ParquetFile(io.BytesIO(store.read(ref, file))).read(names, use_threads=False)
        if only is not None:
            table = table.filter(pc.is_in(table["sample_id"], pa.array(sorted(only))))
        yield from table.to_pylist()


def _response(row: dict[str, Any], replay: dict[str, Any], weight: Weight) -> Response:
    values, step = token_values(replay)
    return Response(
        index=row["index"],
        whole_text=row["text"],
        # Rows that an earlier version wrote have no texts of tokens.
        token_texts=row.get("tokens") or [],
        token_values=values,
        step=step,
        truncated=row["truncated"],
        logprobs={view: _mean(replay[f"logprobs_{view}"]) for view in get_args(View)},
        evidence_score=weight.evidence_score,
        weight=_mean(weight.weights) or 0.0,
    )


def token_values(replay: dict[str, Any]) -> tuple[list[float], float]:
    """Give what tokens are shaded by, and the nats a shade.

    Both crops replayed: d_k = log p(token | relevant crop) - log p(token | irrelevant crop); else the log-prob under
    the one view there is.
    """
    positive, negative = (replay[f"logprobs_{view}"] for view in _GAP_VIEWS)
    if positive is not None and negative is not None:
        return [first - second for first, second in zip(positive, negative, strict=True)], GAP_STEP
    return next(values for view in get_args(View) if (values := replay[f"logprobs_{view}"]) is not None), LOGPROB_STEP


def spaced(text: str, tokens: Iterable[str]) -> Iterator[str]:
    """Give tokens with the white space that stands before them in the text: some tokenizers' tokens have none."""
    position = 0
    for token in tokens:
        start = position
        while text[start : start + 1].isspace() and not text.startswith(token, start):
            start += 1
        # Special tokens are not in the text, and parts of a letter are not either.
        if token and text.startswith(token, start):
            yield text[position:start] + token
            position = start + len(token)
        else:
            yield token


def level_of(value: float, step: float) -> int:
    """Give the shade of a value."""
    return max(-MAX_LEVEL, min(MAX_LEVEL, round(value / step)))


def _mean(values: Sequence[float] | None) -> float | None:
    return statistics.fmean(values) if values else None


def _measure(row: Response, gate: Gate) -> float:
    if isinstance(gate, PrefixTrustConfig):
        return row.weight
    known = row.known_scores
    return known[0] if known else 0.0


def _order(row: Response) -> tuple[float, float, int]:
    return -row.weight, -row.known_scores[0] if row.known_scores else 0.0, row.index


def _card(
    dataset: Dataset, views: ArtifactRef, position: int, sample: Sample, *, rounds: tuple[RoundResponses, ...]
) -> PromptCard:
    crops = dataset.views(views, sample.id, position)
    return PromptCard(
        sample_id=sample.id,
        question=sample.question,
        full=full_picture(dataset, sample),
        positive=picture(open_png(crops.positive_png), _MAX_CROP_SIDE),
        negative=picture(open_png(crops.negative_png), _MAX_CROP_SIDE),
        region=rectangle(sample.region, (sample.image.width, sample.image.height)),
        positive_box=rectangle(crops.positive_box, crops.positive_frame),
        negative_box=rectangle(crops.negative_box, crops.negative_frame),
        rounds=rounds,
    )
