"""Stage: one round of gated training, and the full training state where one is due."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tasks.adapters.store import Outcome, write_json
from tasks.adapters.trainer import POLICY, Update
from tasks.adapters.training_data import CheckpointJob, TrainJob
from tasks.stage import RunContext, stage

SUMMARY = "summary.json"


@stage(TrainJob)
def train(job: TrainJob, context: RunContext, folder: Path) -> Outcome:
    """Make the next policy; what is stored of it is its name, and every few rounds its full state.

    The state is committed before the round is: a crash between the two finds the update done.
    """
    state = CheckpointJob(train_key=job.key)
    stored = context.store.find(state.stage, state.key)
    if stored is not None and not stored.pruned:
        (folder / POLICY).write_bytes(context.store.read(stored.ref, POLICY))
        return Outcome(summary=json.loads(context.store.read(stored.ref, SUMMARY)))
    started = time.perf_counter()
    update = context.engines.trainer.train(job)
    seconds = time.perf_counter() - started
    write_json(folder / POLICY, update.policy)
    if job.round % context.checkpoint_every == 0:
        context.store.produce(state, lambda target: _write_state(update, target))
    measured = {"tokens_per_second": update.num_tokens / seconds, **context.engines.gpu_seconds("trainer", seconds)}
    return Outcome(summary=_summary(update), measured=measured)


@stage(CheckpointJob)
def checkpoint(job: CheckpointJob, context: RunContext, folder: Path) -> Outcome:
    """Store the full state after a round that has none."""
    trained = context.store.find(TrainJob.stage, job.train_key)
    assert trained is not None, "a state is asked for after its round"
    return _write_state(context.engines.trainer.train(TrainJob.model_validate(trained.job)), folder)


def _write_state(update: Update, folder: Path) -> Outcome:
    shutil.copytree(update.folder, folder, dirs_exist_ok=True)
    write_json(folder / POLICY, update.policy)
    write_json(folder / SUMMARY, _summary(update))
    return Outcome(summary=update.policy)


def _summary(update: Update) -> dict[str, Any]:
    return {**update.summary, "num_tokens": update.num_tokens}
