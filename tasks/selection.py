"""Stages: label-free criteria of a checkpoint, on training prompts set aside, and the choice among checkpoints."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from tasks.adapters.store import Outcome, Store, write_json
from tasks.adapters.tables import read_rows, write_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS
from tasks.artifacts import ArtifactRef, Job, Record, Replay, Rollout
from tasks.stage import RunContext, stage
from vzero_core.divergence import sampled_divergence

CRITERIA = "criteria.parquet"
RULE = (
    "The latest candidate whose own responses to the prompts set aside the teacher with the right crop supports as "
    "much as those of the best one, within one standard error."
)
FIGURES = ("divergence", "support", "evidence_score")
Z_95 = 1.96
_COLUMNS = ("sample_id", "index", "logprobs_positive", "logprobs_negative", "max_logprobs")


class PromptCriteria(Record):
    """What the teacher says of a checkpoint's responses to one prompt; nats per token."""

    sample_id: str
    divergence: float
    support: float = Field(description="Mean log-prob of the tokens under the positive view.")
    evidence_score: float


class CriteriaJob(Job):
    """Measure a checkpoint on prompts that training is kept clear of."""

    stage: ClassVar[str] = "criteria"

    rollouts: ArtifactRef
    replay: ArtifactRef
    round: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"criteria, round {self.round}"


class SelectJob(Job):
    """Choose among the candidates of a run."""

    stage: ClassVar[str] = "select"

    criteria: tuple[ArtifactRef, ...]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint with its criteria."""

    round: int
    prompts: tuple[PromptCriteria, ...]
    """The same ones for every candidate of a run."""

    @property
    def divergence(self) -> float:
        """Mean over prompts, nats per token."""
        return statistics.fmean(row.divergence for row in self.prompts)

    @property
    def support(self) -> float:
        """Mean over prompts, nats per token."""
        return statistics.fmean(row.support for row in self.prompts)

    @property
    def evidence_score(self) -> float:
        """Mean over prompts, nats per token."""
        return statistics.fmean(row.evidence_score for row in self.prompts)


@stage(CriteriaJob)
def criteria(job: CriteriaJob, context: RunContext, folder: Path) -> Outcome:
    """Compare the checkpoint's own log-probs of its responses with the teacher's, who sees the right crop."""
    rollouts = read_rows(context.store.read(job.rollouts, ROLLOUTS), Rollout)
    replays = read_rows(context.store.read(job.replay, REPLAYS), Replay, _COLUMNS)
    own: dict[str, list[tuple[Rollout, Replay]]] = defaultdict(list)
    for rollout, replay in zip(rollouts, replays, strict=True):
        assert (rollout.sample_id, rollout.index) == (replay.sample_id, replay.index), "replay keeps the order"
        own[rollout.sample_id].append((rollout, replay))
    rows = [_criteria_of(sample_id, members) for sample_id, members in own.items()]
    write_rows(folder / CRITERIA, rows, PromptCriteria)
    summary: dict[str, float | None] = {
        "num_prompts": len(rows),
        "num_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
    }
    for name in FIGURES:
        summary[name], summary[f"{name}_se"] = _mean_and_error([getattr(row, name) for row in rows])
    return Outcome(summary=summary)


def _criteria_of(sample_id: str, members: Sequence[tuple[Rollout, Replay]]) -> PromptCriteria:
    student = torch.tensor([value for rollout, _ in members for value in rollout.logprobs]).double()
    positive = torch.tensor([value for _, replay in members for value in replay.logprobs_positive or ()]).double()
    negative = torch.tensor([value for _, replay in members for value in replay.logprobs_negative or ()]).double()
    return PromptCriteria(
        sample_id=sample_id,
        divergence=sampled_divergence(student, positive, "k1").mean().item(),
        support=positive.mean().item(),
        evidence_score=(positive - negative).mean().item(),
    )


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


@stage(SelectJob)
def select(job: SelectJob, context: RunContext, folder: Path) -> Outcome:
    """Choose a checkpoint by the rule of docs/SELECTION.md, and say why."""
    candidates = read_candidates(context.store, job.criteria)
    chosen, last = choose(candidates), candidates[-1]
    table = [{"round": found.round, **{name: getattr(found, name) for name in FIGURES}} for found in candidates]
    summary = {
        "round": chosen.round,
        "last_round": last.round,
        "rule": RULE,
        "reason": explain(candidates),
        **{f"{name}_per_10_rounds": trend(candidates, name) for name in FIGURES},
    }
    write_json(folder / "selection.json", {"candidates": table, **summary})
    return Outcome(summary=summary)


def read_candidates(store: Store, refs: Sequence[ArtifactRef]) -> list[Candidate]:
    """Give checkpoints with their criteria."""
    return [
        Candidate(store.manifest(ref).job["round"], tuple(read_rows(store.read(ref, CRITERIA), PromptCriteria)))
        for ref in refs
    ]


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Give the latest checkpoint whose support is within one standard error of the highest.

    The error is that of the mean difference to the one with the highest support, prompt by prompt. Of two whose order
    is a matter of chance the one that was trained longer is taken; once the support falls, an earlier one.

    Args:
        candidates: of one run, by round; round 0, the student before training, is not among what is chosen from.

    Source: the one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984.
    """
    trained = [found for found in candidates if found.round > 0]
    highest = max(trained, key=lambda found: found.support)

    def is_near(found: Candidate) -> bool:
        less, error = _difference(found, highest)
        return error is not None and less <= error

    return next((found for found in reversed(trained) if is_near(found)), highest)


def explain(candidates: Sequence[Candidate]) -> str:
    """Say how the chosen checkpoint stands to the highest support, to the last one and to the untrained student."""
    chosen, first, last = choose(candidates), candidates[0], candidates[-1]
    highest = max(candidates[1:], key=lambda found: found.support)
    parts = [f"round {chosen.round} has a support of {chosen.support:.3f} nats per token"]
    if chosen is highest:
        parts[0] += ", the highest"
    else:
        parts.append(f"the highest, round {highest.round}, is {highest.support:.3f}, {_apart(chosen, highest)}")
    if chosen is not last:
        parts.append(f"the last, round {last.round}, has {last.support:.3f}, {_apart(chosen, last)}")
    parts.append(f"before training it was {first.support:.3f}, {_apart(chosen, first)}")
    return "; ".join(parts)


def _difference(first: Candidate, second: Candidate) -> tuple[float, float | None]:
    """Give how much more support the second one has, and the standard error of that, prompt by prompt."""
    pairs = zip(first.prompts, second.prompts, strict=True)
    return _mean_and_error([right.support - left.support for left, right in pairs])


def _apart(first: Candidate, second: Candidate) -> str:
    """Say whether two supports can be told apart."""
    more, error = _difference(first, second)
    if error is None or abs(more) <= Z_95 * error:
        return "a difference inside the noise"
    return "clearly more" if more > 0 else "clearly less"


def trend(candidates: Sequence[Candidate], name: str) -> float | None:
    """Give where a criterion was heading over the last half of the candidates.

    Args:
        candidates: of one run, by round.
        name: of the criterion.

    Returns:
        Slope of the least-squares line, nats per token in 10 rounds; None of fewer than two candidates.
    """
    late = [found for found in candidates if found.round > 0][-max(2, len(candidates) // 2) :]
    if len(late) < 2:
        return None
    slope = statistics.linear_regression([found.round for found in late], [getattr(found, name) for found in late])
    return 10 * slope.slope
