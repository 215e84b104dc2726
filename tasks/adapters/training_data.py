"""A round's training rows, and how they are cut into mini-batches and forward batches."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tasks.adapters.dataset import Dataset, by_id
from tasks.adapters.prompts import ModelInputs, PromptProcessor, num_tokens, signature
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, Job, Replay, Rollout, Weight, digest_json
from tasks.config import EngineFingerprint, OptimizerConfig, PromptConfig
from vzero_core.config import Loss, Target
from vzero_core.divergence import sampled_divergence
from vzero_core.importance import importance_health

ROLLOUTS, REPLAYS, WEIGHTS = "rollouts.parquet", "replay.parquet", "weights.parquet"


class TrainJob(Job):
    """One round of training."""

    stage: ClassVar[str] = "train"

    policy: ArtifactRef
    samples: ArtifactRef
    rollouts: tuple[ArtifactRef, ...]
    replays: tuple[ArtifactRef, ...]
    gate: ArtifactRef
    prompt: PromptConfig
    target: Target
    loss: Loss
    optimizer: OptimizerConfig
    engine: EngineFingerprint
    seed: int
    round: int

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"train, round {self.round}"


class CheckpointJob(Job):
    """The full training state after a round."""

    stage: ClassVar[str] = "checkpoint"

    train_key: str


class TrainingPrompt:
    """A prompt that is encoded when it is first needed: a process decodes the images of its own share alone."""

    def __init__(self, encode: Callable[[], ModelInputs]) -> None:
        """Keep what encodes it."""
        self._encode = encode

    @cached_property
    def inputs(self) -> ModelInputs:
        """The encoded prompt."""
        return self._encode()


@dataclass(frozen=True)
class TrainingRow:
    """One response with all that the loss needs of it."""

    sample_id: str
    prompt: TrainingPrompt
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    teacher_logprobs: tuple[float, ...]
    topk_ids: tuple[tuple[int, ...], ...]
    topk_logprobs: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


def read_training_rows(job: TrainJob, store: Store, dataset: Dataset, processor: PromptProcessor) -> list[TrainingRow]:
    """Join rollouts, replays and weights of a round; rows of one prompt share it."""
    samples = by_id(dataset.samples(job.samples))
    replays: dict[tuple[str, int], Replay] = {}
    for ref in job.replays:
        replays |= {(row.sample_id, row.index): row for row in read_rows(store.read(ref, REPLAYS), Replay)}
    weights = {(row.sample_id, row.index): row for row in read_rows(store.read(job.gate, WEIGHTS), Weight)}
    prompts: dict[str, TrainingPrompt] = {}
    rows = []

    def encode(sample_id: str) -> ModelInputs:
        _, sample = samples[sample_id]
        return processor.encode(processor.prompt(sample.question, [dataset.image(sample)], job.prompt))

    for ref in job.rollouts:
        for rollout in read_rows(store.read(ref, ROLLOUTS), Rollout):
            if rollout.sample_id not in prompts:
                prompts[rollout.sample_id] = TrainingPrompt(partial(encode, rollout.sample_id))
            replay = replays[rollout.sample_id, rollout.index]
            teacher = replay.logprobs_positive if job.target == "positive" else replay.logprobs_none
            assert teacher is not None, "replay holds the target view"
            assert len(teacher) == len(rollout.token_ids), "replay and rollout are of one response"
            rows.append(
                TrainingRow(
                    sample_id=rollout.sample_id,
                    prompt=prompts[rollout.sample_id],
                    token_ids=rollout.token_ids,
                    sampler_logprobs=rollout.logprobs,
                    teacher_logprobs=teacher,
                    topk_ids=replay.topk_ids or (),
                    topk_logprobs=replay.topk_logprobs or (),
                    weights=weights[rollout.sample_id, rollout.index].weights,
                )
            )
    return rows


def mini_batches(rows: Sequence[TrainingRow], job: TrainJob, epoch: int) -> list[list[int]]:
    """Cut a round into mini-batches of whole groups; the order depends on seed, round and epoch alone."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.sample_id].append(index)
    order = sorted(groups)
    random.Random(int(digest_json([job.seed, job.round, epoch, "mini_batches"]), 16)).shuffle(order)
    count = min(job.optimizer.mini_batches, len(order))
    parts = [order[start::count] for start in range(count)]
    return [[index for sample_id in part for index in groups[sample_id]] for part in parts]


def share_of(rows: Sequence[TrainingRow], mini_batch: Sequence[int], process: int, num_processes: int) -> list[int]:
    """Give a process its part of a mini-batch: whole groups, dealt out in turn; none where there are too few."""
    groups = list(dict.fromkeys(rows[index].sample_id for index in mini_batch))
    own = set(groups[process::num_processes])
    return [index for index in mini_batch if rows[index].sample_id in own]


def micro_batches(
    rows: Sequence[TrainingRow], indices: Sequence[int], max_batch_tokens: int, *, shared: bool
) -> list[list[int]]:
    """Cut rows into forward batches within a token budget; a group too large for it is cut too.

    Args:
        rows: a round's responses.
        indices: those to cut.
        max_batch_tokens: padding included; one response more than that is a batch of its own.
        shared: a prompt counts once for its responses in a batch; else once for each.

    Returns:
        Positions in `rows`: prompts that can be stacked, with equally many responses each, which stand together.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        groups[rows[index].sample_id].append(index)
    stacks: dict[object, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        for part in _parts(rows, members, max_batch_tokens, shared):
            stacks[signature(rows[part[0]].prompt.inputs), len(part)].append(part)
    batches = []
    for same in stacks.values():
        batch: list[int] = []
        for part in same:
            # Two parts of one group would count as one prompt with more responses than the others have.
            again = any(rows[index].sample_id == rows[part[0]].sample_id for index in batch)
            if batch and (again or _cost(rows, [*batch, *part], shared) > max_batch_tokens):
                batches.append(batch)
                batch = []
            batch = [*batch, *part]
        batches.append(batch)
    return batches


def _parts(rows: Sequence[TrainingRow], members: list[int], max_batch_tokens: int, shared: bool) -> list[list[int]]:
    count = 1
    while True:
        parts = [members[start::count] for start in range(count)]
        if count == len(members) or all(_cost(rows, part, shared) <= max_batch_tokens for part in parts):
            return parts
        count += 1


def _cost(rows: Sequence[TrainingRow], batch: Sequence[int], shared: bool) -> int:
    longest = max(len(rows[index].token_ids) for index in batch)
    num_prompts = len({rows[index].sample_id for index in batch}) if shared else len(batch)
    return num_prompts * num_tokens(rows[batch[0]].prompt.inputs) + len(batch) * longest


def divergences(
    rows: Sequence[TrainingRow], old_logprobs: Sequence[Tensor], entropy: float, importance_cap: float | None
) -> dict[str, Any]:
    """Give how far policy, teacher and sampler are apart on a round's responses as the round begins.

    Args:
        rows: the round's responses.
        old_logprobs: by row, [T] float, nats; the trainer's log-probs as the round begins.
        entropy: nats; the policy's mean.
        importance_cap: the optimizer's; None where no importance weight is used.

    Raises:
        InputError: a log-prob of the policy or of the sampler is not finite.
    """
    policy = torch.cat(list(old_logprobs)).cpu()
    teacher = torch.tensor([value for row in rows for value in row.teacher_logprobs])
    sampler = torch.tensor([value for row in rows for value in row.sampler_logprobs])
    difference = (policy - sampler).abs()
    return {
        "divergence_k1": sampled_divergence(policy, teacher, "k1").mean().item(),
        "divergence_k3": sampled_divergence(policy, teacher, "k3").mean().item(),
        "entropy": entropy,
        "sampler_difference_mean": difference.mean().item(),
        "sampler_difference_max": difference.max().item(),
        **asdict(importance_health(policy, sampler, importance_cap)),
    }
