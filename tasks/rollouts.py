"""Stage: the student's responses to one shard of a round's prompts, from the full image alone."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tasks.adapters.dataset import by_id
from tasks.adapters.store import Outcome
from tasks.adapters.tables import write_rows
from tasks.adapters.training_data import ROLLOUTS
from tasks.artifacts import ArtifactRef, Job, Rollout, digest_json
from tasks.config import EngineFingerprint, PromptConfig, SamplingConfig
from tasks.ports import SamplingRequest
from tasks.stage import RunContext, stage
from tasks.training_set import require_prompts
from vzero_core.errors import InputError


class RolloutsJob(Job):
    """Sample responses to a shard of a round's prompts."""

    stage: ClassVar[str] = "rollouts"
    version: ClassVar[int] = 3

    policy: ArtifactRef
    samples: ArtifactRef
    """Training set."""
    prompt: PromptConfig
    sampling: SamplingConfig
    engine: EngineFingerprint
    seed: int
    round: int
    prompts_per_round: int
    shard: int
    num_shards: int
    held_out: bool = False
    """All prompts that are set aside are asked, after the round; else the round's own, which are never among them."""

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        what = "candidate rollouts" if self.held_out else "rollouts"
        return f"{what}, round {self.round}" + (f", shard {self.shard}" if self.num_shards > 1 else "")


@stage(RolloutsJob)
def rollouts(job: RolloutsJob, context: RunContext, folder: Path) -> Outcome:
    """Sample G responses per prompt; each response's randomness is (seed, round, sample, number) alone."""
    samples = by_id(context.dataset.samples(job.samples))
    training, held_out = context.dataset.split(job.samples)
    chosen = held_out if job.held_out else prompts_of_shard(training, job)
    # Checkpoints are compared on the same draws.
    number: int | str = "held out" if job.held_out else job.round
    engine = context.engines.student(job.policy)
    requests = [
        SamplingRequest(
            prompt=context.engines.renderer.prompt(
                samples[sample_id][1].question, [context.dataset.image(samples[sample_id][1])], job.prompt
            ),
            seeds=tuple(
                int(digest_json([job.seed, number, sample_id, index, "rollout"]), 16)
                for index in range(job.sampling.num_responses)
            ),
        )
        for sample_id in chosen
    ]
    started = time.perf_counter()
    with context.progress(job.title, len(requests)) as advance:
        responses = engine.sample(
            requests,
            temperature=job.sampling.temperature,
            max_new_tokens=job.sampling.max_new_tokens,
            advance=advance,
        )
    seconds = time.perf_counter() - started
    others = {response.weights for group in responses for response in group} - {job.policy.digest}
    if others:
        raise InputError(
            f"rollouts must come from the policy {job.policy.digest}, but the engine names {sorted(map(str, others))}; "
            "let no other run exchange its weights"
        )
    rows = [
        Rollout(
            sample_id=sample_id,
            index=index,
            policy=job.policy.digest,
            token_ids=response.token_ids,
            logprobs=response.logprobs,
            text=response.text,
            tokens=tuple(context.engines.renderer.texts(response.token_ids)),
            truncated=response.truncated,
        )
        for sample_id, group in zip(chosen, responses, strict=True)
        for index, response in enumerate(group)
    ]
    write_rows(folder / ROLLOUTS, rows, Rollout)
    num_tokens = sum(len(row.token_ids) for row in rows)
    return Outcome(
        summary={
            "num_responses": len(rows),
            "num_tokens": num_tokens,
            "mean_length": num_tokens / len(rows),
            "truncated_share": sum(row.truncated for row in rows) / len(rows),
        },
        measured={"tokens_per_second": num_tokens / seconds, **context.engines.gpu_seconds("student", seconds)},
    )


def prompts_of_shard(sample_ids: Sequence[str], job: RolloutsJob) -> list[str]:
    """Give the prompts of a shard: the next ones of this epoch's order, which depends on seed and epoch alone.

    A round never spans two epochs, so no prompt stands in it twice; what is left of an epoch is passed over.
    """
    require_prompts(sample_ids, job.prompts_per_round)
    rounds_per_epoch = len(sample_ids) // job.prompts_per_round
    epoch, position = divmod(job.round - 1, rounds_per_epoch)
    order = sorted(sample_ids)
    random.Random(int(digest_json([job.seed, epoch, "prompt order"]), 16)).shuffle(order)
    prompts = order[position * job.prompts_per_round :][: job.prompts_per_round]
    bounds = [shard * len(prompts) // job.num_shards for shard in (job.shard, job.shard + 1)]
    return prompts[bounds[0] : bounds[1]]
