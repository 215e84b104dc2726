"""A few prompts of a round as a person can judge them: pictures, boxes, responses, scores and weights."""

import base64
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow.parquet as pq
from PIL import Image

from tasks.adapters.dataset import Dataset, by_id, open_png
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS, WEIGHTS
from tasks.artifacts import ArtifactRef, Sample, Weight
from vzero_core.config import Gate, GateConfig, PrefixTrustConfig, View

_MAX_SIDE = 560
"""Pixels; larger pictures are shown smaller, since the page carries them."""
_MAX_CROP_SIDE = 280
_PIXELATED_BELOW = 240
"""Pixels; a picture whose sides are shorter is enlarged as it is, so that a reader sees what the model sees."""
_MAX_PNG_BYTES = 60_000
"""Larger than this is a photograph, which JPEG holds in a tenth of the room."""
_MAX_TEXT = 10_000
"""Characters of a response that are shown; more than responses of the usual length have."""


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    uri: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """Whether its pixels are to be seen one by one."""
        return max(self.width, self.height) < _PIXELATED_BELOW


@dataclass(frozen=True)
class Rectangle:
    """A box in percent of the picture it is drawn on."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Response:
    """One response and what teacher and gate say of it; None where the run did not ask."""

    index: int
    text: str
    num_left_out: int
    num_tokens: int
    truncated: bool
    logprobs: dict[View, float | None]
    evidence_score: float | None
    weight: float
    """Mean over tokens where each has its own."""

    @property
    def known_scores(self) -> list[float]:
        """Evidence score and log-probs, those that there are, the evidence score first."""
        return [value for value in (self.evidence_score, *self.logprobs.values()) if value is not None]


@dataclass(frozen=True)
class PromptCard:
    """One prompt with all of its responses, the heaviest first."""

    round: int
    sample_id: str
    question: str
    spread: float
    full: Picture
    positive: Picture
    negative: Picture
    region: Rectangle | None
    positive_box: Rectangle | None
    negative_box: Rectangle | None
    responses: tuple[Response, ...]

    @property
    def views(self) -> list[View]:
        """The views that were replayed."""
        return [view for view in get_args(View) if any(row.logprobs[view] is not None for row in self.responses)]


def spread_of(gate: Gate) -> str:
    """Say what prompts are chosen by."""
    if isinstance(gate, GateConfig):
        return "their evidence score, nats per token"
    return (
        "their mean token weight"
        if isinstance(gate, PrefixTrustConfig)
        else "the teacher's mean log-prob, nats per token"
    )


def choose_prompts(
    store: Store,
    dataset: Dataset,
    *,
    round_number: int,
    views: ArtifactRef,
    rollouts: Sequence[ArtifactRef],
    replays: Sequence[ArtifactRef],
    weights: ArtifactRef,
    gate: Gate,
    count: int,
) -> list[PromptCard]:
    """Give the prompts of a round whose responses differ most in what the gate goes by (`spread_of`)."""
    weighed = {(row.sample_id, row.index): row for row in read_rows(store.read(weights, WEIGHTS), Weight)}
    names = ["sample_id", "index", *(f"logprobs_{view}" for view in get_args(View))]
    replayed = {(row["sample_id"], row["index"]): row for row in _columns(store, replays, REPLAYS, names)}
    groups: dict[str, list[Response]] = defaultdict(list)
    for row in _columns(store, rollouts, ROLLOUTS, ["sample_id", "index", "text", "truncated"]):
        key = row["sample_id"], row["index"]
        groups[row["sample_id"]].append(_response(row, replayed[key], weighed[key]))
    spreads = {name: statistics.pstdev(_measure(row, gate) for row in group) for name, group in groups.items()}
    samples = by_id(dataset.samples(views))
    return [
        _card(dataset, views, *samples[name], round_number=round_number, spread=spreads[name], responses=groups[name])
        for name in sorted(spreads, key=lambda name: (-spreads[name], name))[:count]
    ]


def _columns(store: Store, refs: Iterable[ArtifactRef], file: str, names: list[str]) -> list[dict[str, Any]]:
    # Column by column: the top-k lists beside them are a hundred times their size.
    return [row for ref in refs for row in pq.read_table(io.BytesIO(store.read(ref, file)), columns=names).to_pylist()]


def _response(row: dict[str, Any], replay: dict[str, Any], weight: Weight) -> Response:
    logprobs = {view: _mean(replay[f"logprobs_{view}"]) for view in get_args(View)}
    tokens = next(values for view in get_args(View) if (values := replay[f"logprobs_{view}"]) is not None)
    return Response(
        index=row["index"],
        text=row["text"][:_MAX_TEXT],
        num_left_out=max(0, len(row["text"]) - _MAX_TEXT),
        num_tokens=len(tokens),
        truncated=row["truncated"],
        logprobs=logprobs,
        evidence_score=weight.evidence_score,
        weight=_mean(weight.weights) or 0.0,
    )


def _mean(values: Sequence[float] | None) -> float | None:
    return statistics.fmean(values) if values else None


def _measure(row: Response, gate: Gate) -> float:
    if isinstance(gate, PrefixTrustConfig):
        return row.weight
    known = row.known_scores
    return known[0] if known else 0.0


def _card(
    dataset: Dataset,
    views: ArtifactRef,
    position: int,
    sample: Sample,
    *,
    round_number: int,
    spread: float,
    responses: list[Response],
) -> PromptCard:
    crops = dataset.views(views, sample.id, position)

    def order(row: Response) -> tuple[float, float, int]:
        return -row.weight, -row.known_scores[0] if row.known_scores else 0.0, row.index

    return PromptCard(
        round=round_number,
        sample_id=sample.id,
        question=sample.question,
        spread=spread,
        full=_picture(dataset.image(sample), _MAX_SIDE),
        positive=_picture(open_png(crops.positive_png), _MAX_CROP_SIDE),
        negative=_picture(open_png(crops.negative_png), _MAX_CROP_SIDE),
        region=_rectangle(sample.region, (sample.image.width, sample.image.height)),
        positive_box=_rectangle(crops.positive_box, crops.positive_frame),
        negative_box=_rectangle(crops.negative_box, crops.negative_frame),
        responses=tuple(sorted(responses, key=order)),
    )


def _rectangle(box: Sequence[float] | None, frame: Sequence[int]) -> Rectangle | None:
    """Give a box in percent of its frame: frames differ in size, but all show the same field of view."""
    if box is None:
        return None
    (x1, y1, x2, y2), (width, height) = box, frame
    percent = (100 * x1 / width, 100 * y1 / height, 100 * (x2 - x1) / width, 100 * (y2 - y1) / height)
    return Rectangle(*(round(value, 3) for value in percent))


def _picture(image: Image.Image, max_side: int) -> Picture:
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    content, kind = _encode(image, "PNG", optimize=True), "png"
    if len(content) > _MAX_PNG_BYTES:
        content, kind = _encode(image, "JPEG", quality=85), "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size)


def _encode(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()
