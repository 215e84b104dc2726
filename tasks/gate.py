"""Stage: how much each response, or each token, counts in a round's training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch

from tasks.adapters.store import Outcome
from tasks.adapters.tables import read_rows, write_rows
from tasks.adapters.training_data import REPLAYS, WEIGHTS
from tasks.artifacts import ArtifactRef, Job, Replay, Weight
from tasks.stage import RunContext, stage
from vzero_core.config import Gate, GateConfig, PrefixTrustConfig, Target
from vzero_core.diagnostics import gate_health
from vzero_core.evidence import evidence_scores
from vzero_core.gating import gate_weights, prefix_trust

COLUMNS = tuple(name for name in Replay.model_fields if name not in ("topk_ids", "topk_logprobs"))
"""Of a replay; the likeliest tokens, most of its bytes, are for the loss alone."""


class GateJob(Job):
    """Weigh the responses of a round."""

    stage: ClassVar[str] = "gate"

    replays: tuple[ArtifactRef, ...]
    gate: Gate
    target: Target
    round: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"gate, round {self.round}"


@stage(GateJob)
def gate(job: GateJob, context: RunContext, folder: Path) -> Outcome:
    """Give every response of the round its weight, from the teacher's log-probs alone."""
    replays = [row for ref in job.replays for row in read_rows(context.store.read(ref, REPLAYS), Replay, COLUMNS)]
    if isinstance(job.gate, GateConfig):
        rows, summary = _contrastive(replays, job.gate)
    elif isinstance(job.gate, PrefixTrustConfig):
        rows, summary = _prefix_trust(replays, job.gate, job.target)
    else:
        rows = [Weight(sample_id=row.sample_id, index=row.index, weights=(1.0,)) for row in replays]
        summary = {}
    write_rows(folder / WEIGHTS, rows, Weight)
    return Outcome(summary=summary)


def _contrastive(replays: list[Replay], config: GateConfig) -> tuple[list[Weight], dict[str, Any]]:
    positive, mask = _padded([row.logprobs_positive or () for row in replays])
    negative, _ = _padded([row.logprobs_negative or () for row in replays])
    scores = evidence_scores(positive, negative, mask, config.gamma)
    numbers: dict[str, int] = {}
    group_ids = torch.tensor([numbers.setdefault(row.sample_id, len(numbers)) for row in replays])
    weights = gate_weights(scores, group_ids, config)
    health = gate_health(scores, weights, group_ids, mask.sum(-1), config)
    rows = [
        Weight(sample_id=row.sample_id, index=row.index, evidence_score=score, weights=(weight,))
        for row, score, weight in zip(replays, scores.tolist(), weights.tolist(), strict=True)
    ]
    return rows, {"evidence_score": scores.mean().item(), **asdict(health)}


def _prefix_trust(
    replays: list[Replay], config: PrefixTrustConfig, target: Target
) -> tuple[list[Weight], dict[str, Any]]:
    logprobs, mask = _padded([getattr(row, f"logprobs_{target}") for row in replays])
    max_logprobs, _ = _padded([row.max_logprobs for row in replays])
    weights = prefix_trust(logprobs, max_logprobs, mask, config.floor)
    rows = [
        Weight(sample_id=row.sample_id, index=row.index, weights=tuple(values[: len(row.max_logprobs)]))
        for row, values in zip(replays, weights.tolist(), strict=True)
    ]
    return rows, {"mean_token_weight": (weights.sum() / mask.sum()).item()}


def _padded(rows: list[tuple[float, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return values, torch.arange(values.shape[1]) < lengths[:, None]
