"""Wiring of one round: the student responds, the teacher replays, the gate weighs, the student learns."""

from typing import cast

from prefect.futures import PrefectConcurrentFuture, wait

from flows.config import RunConfig
from flows.run import fingerprint, trainer_fingerprint
from flows.summary import show_round
from tasks.adapters.training_data import TrainJob
from tasks.artifacts import ArtifactRef
from tasks.config import VLLMEngine
from tasks.gate import GateJob, gate
from tasks.replay import ReplayJob, replay
from tasks.report import RoundRefs
from tasks.rollouts import RolloutsJob, rollouts
from tasks.stage import RunContext
from tasks.train import train
from tasks.training_set import require_prompts
from vzero_core.config import ForwardKLTopKLoss, required_views


def require_round(config: RunConfig, run: RunContext, samples: ArtifactRef) -> None:
    """Make sure that a round has its prompts, before any model is loaded.

    Raises:
        InputError: there are too few samples.
    """
    require_prompts(run.dataset.split(samples)[0], config.rounds.prompts_per_round)


def train_round(
    config: RunConfig, run: RunContext, number: int, policy: ArtifactRef, teacher: ArtifactRef, samples: ArtifactRef
) -> RoundRefs:
    """Make one round's artefacts; a shard is replayed while the next one is sampled, where the teacher is a server."""
    sampled, replayed = _sample_and_replay(config, run, number, policy, teacher, samples)
    weights = gate(GateJob(replays=replayed, gate=config.gate, target=config.replay.target, round=number), run)
    job = TrainJob(
        policy=policy,
        samples=samples,
        rollouts=sampled,
        replays=replayed,
        gate=weights,
        prompt=config.prompt,
        target=config.replay.target,
        loss=config.loss,
        optimizer=config.optimizer,
        engine=trainer_fingerprint(config.student),
        seed=config.seed,
        round=number,
    )
    fresh = run.store.find(job.stage, job.key) is None
    refs = RoundRefs(round=number, rollouts=sampled, replays=replayed, gate=weights, train=train(job, run))
    if fresh:
        show_round(run.store, refs)
    return refs


def _sample_and_replay(
    config: RunConfig, run: RunContext, number: int, policy: ArtifactRef, teacher: ArtifactRef, samples: ArtifactRef
) -> tuple[tuple[ArtifactRef, ...], tuple[ArtifactRef, ...]]:
    # Two models in this process would only take turns on its cores or its device.
    overlap = isinstance(config.teacher.engine, VLLMEngine)
    sampled: list[ArtifactRef] = []
    replayed: list[ArtifactRef] = []
    submitted: list[PrefectConcurrentFuture[ArtifactRef]] = []
    try:
        for shard in range(config.rounds.num_shards):
            # Where the teacher fails, sampling more would only cost time.
            replayed += [future.result() for future in submitted[len(replayed) :] if future.wrapped_future.done()]
            sampled.append(
                rollouts(
                    RolloutsJob(
                        policy=policy,
                        samples=samples,
                        prompt=config.prompt,
                        sampling=config.sampling,
                        engine=fingerprint(config.student),
                        seed=config.seed,
                        round=number,
                        prompts_per_round=config.rounds.prompts_per_round,
                        shard=shard,
                        num_shards=config.rounds.num_shards,
                    ),
                    run,
                )
            )
            job = ReplayJob(
                teacher=teacher,
                rollouts=sampled[-1],
                views=samples,
                prompt=config.prompt,
                replayed=required_views(config.gate, config.replay.target),
                target=config.replay.target,
                top_k=config.loss.k if isinstance(config.loss, ForwardKLTopKLoss) else 0,
                engine=fingerprint(config.teacher),
                round=number,
                shard=shard,
                num_shards=config.rounds.num_shards,
            )
            if overlap:
                submitted.append(cast(PrefectConcurrentFuture[ArtifactRef], replay.submit(job, run)))
            else:
                replayed.append(replay(job, run))
        replayed += [future.result() for future in submitted[len(replayed) :]]
    except Exception:
        # The shard that the teacher is at is worth keeping; its servers are stopped when the flow ends.
        wait([future for future in submitted if not future.wrapped_future.cancel()])
        raise
    return tuple(sampled), tuple(replayed)
