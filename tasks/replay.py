"""Stage: the teacher's log-probs of every response token, under each view that gate and loss need."""

import time
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from tasks.adapters.dataset import by_id, open_png
from tasks.adapters.store import Outcome
from tasks.adapters.tables import read_rows, write_rows
from tasks.adapters.training_data import REPLAYS, ROLLOUTS
from tasks.artifacts import ArtifactRef, Job, Replay, Rollout
from tasks.config import EngineFingerprint, PromptConfig
from tasks.ports import ReplayRequest, ResponseScores
from tasks.stage import RunContext, stage
from vzero_core.config import Target, View


class ReplayJob(Job):
    """Replay the responses of a shard."""

    stage: ClassVar[str] = "replay"

    teacher: ArtifactRef
    rollouts: ArtifactRef
    views: ArtifactRef
    prompt: PromptConfig
    replayed: tuple[View, ...]
    target: Target
    top_k: int
    engine: EngineFingerprint
    round: int
    shard: int
    num_shards: int
    held_out: bool = False

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        what = "candidate replay" if self.held_out else "replay"
        return f"{what}, round {self.round}" + (f", shard {self.shard}" if self.num_shards > 1 else "")


@stage(ReplayJob)
def replay(job: ReplayJob, context: RunContext, folder: Path) -> Outcome:
    """Teacher-force each response after the same text and full image; only the extra crop differs."""
    groups: dict[str, list[Rollout]] = {}
    for row in read_rows(context.store.read(job.rollouts, ROLLOUTS), Rollout):
        groups.setdefault(row.sample_id, []).append(row)
    requests = _requests(job, context, groups)
    with context.engines.asking_teacher(), context.progress(job.title, len(requests)) as advance:
        started = time.perf_counter()
        found = iter(context.engines.teacher(job.teacher).score(requests, advance=advance))
        seconds = time.perf_counter() - started
    rows = []
    scores: list[ResponseScores] = []
    for members in groups.values():
        views: dict[View, list[ResponseScores]] = {view: next(found) for view in job.replayed}
        scores += [score for group in views.values() for score in group]
        rows += [
            _row(rollout, {view: group[position] for view, group in views.items()}, job)
            for position, rollout in enumerate(members)
        ]
    write_rows(folder / REPLAYS, rows, Replay)
    num_tokens = sum(len(row.max_logprobs) for row in rows)
    return Outcome(
        summary={"num_tokens": num_tokens, "mean_logprob": _mean_logprobs(rows)},
        measured={
            "tokens_per_second": len(job.replayed) * num_tokens / seconds,
            **_num_computed(scores),
            **context.engines.gpu_seconds("teacher", seconds),
        },
    )


def _num_computed(scores: list[ResponseScores]) -> dict[str, float]:
    """What the prompts cost: tokens with the prompt counted for every response, and those the engine computed."""
    return {
        "num_prompted_tokens": sum(score.num_tokens for score in scores),
        "num_computed_tokens": sum(score.num_computed_tokens for score in scores),
    }


def _requests(job: ReplayJob, context: RunContext, groups: dict[str, list[Rollout]]) -> list[ReplayRequest]:
    """Ask for every view of every group; the views of one group share their image, and so its computation."""
    samples = by_id(context.dataset.samples(job.views))
    requests = []
    for sample_id, members in groups.items():
        position, sample = samples[sample_id]
        full = context.dataset.image(sample)
        crops = None
        if set(job.replayed) != {"none"}:
            crops = context.dataset.views(job.views, sample_id, position)
        for view in job.replayed:
            images: list[Image.Image] = [full]
            if crops is not None and view != "none":
                images.append(open_png(crops.positive_png if view == "positive" else crops.negative_png))
            prompt = context.engines.renderer.prompt(sample.question, images, job.prompt)
            # Of the target view at least the likeliest token, of the other one the response's own alone.
            top_k = max(job.top_k, 1) if view == job.target else 0
            requests.append(ReplayRequest(prompt, tuple(row.token_ids for row in members), top_k))
    return requests


def _row(rollout: Rollout, scores: dict[View, ResponseScores], job: ReplayJob) -> Replay:
    logprobs: dict[View, tuple[float, ...]] = {view: _floats(score.logprobs) for view, score in scores.items()}
    target = scores[job.target]
    return Replay(
        sample_id=rollout.sample_id,
        index=rollout.index,
        logprobs_positive=logprobs.get("positive"),
        logprobs_negative=logprobs.get("negative"),
        logprobs_none=logprobs.get("none"),
        max_logprobs=_floats(target.topk_logprobs[:, 0]),
        topk_ids=tuple(tuple(ids) for ids in target.topk_ids.tolist()) if job.top_k else None,
        topk_logprobs=tuple(tuple(values) for values in target.topk_logprobs.tolist()) if job.top_k else None,
    )


def _floats(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(tensor.tolist())


def _mean_logprobs(rows: list[Replay]) -> dict[str, float]:
    """Mean log-prob of the responses' tokens under each view, nats: the teacher's support."""
    means = {}
    for view in ("positive", "negative", "none"):
        values = [value for row in rows for value in getattr(row, f"logprobs_{view}") or ()]
        if values:
            means[view] = sum(values) / len(values)
    return means
