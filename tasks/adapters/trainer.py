"""The trainer: a job in, updated weights out; alone, or on every one of several processes.

Between calls it holds the last policy's weights and optimizer state. Given a job on another policy it goes back to the
nearest training state and repeats the rounds since then from their stored rollouts.

Each process computes the gradient of its share of a mini-batch's prompts; loss and normalisation are the whole
mini-batch's, so that the update does not depend on the number of processes.
"""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from tasks.adapters.dataset import Dataset
from tasks.adapters.models import model_folder
from tasks.adapters.output_layer import TokenScores
from tasks.adapters.store import Store
from tasks.adapters.training_data import (
    CheckpointJob,
    TrainingRow,
    TrainJob,
    divergences,
    micro_batches,
    mini_batches,
    read_training_rows,
    share_of,
)
from tasks.adapters.training_state import TrainingState
from tasks.adapters.transformers_engine import pad_right
from tasks.artifacts import ArtifactRef
from tasks.config import LoRAConfig, OptimizerConfig, TrainerConfig
from vzero_core.config import ForwardKLTopKLoss
from vzero_core.importance import importance_weights
from vzero_core.losses import TopK, gated_distillation_loss

log = logging.getLogger("vzero.trainer")

POLICY = "policy.json"


@dataclass(frozen=True)
class Update:
    """What a job made.

    Attributes:
        folder: local folder with model/ (a Hugging Face folder), state/ (optimizer and counters) and, with LoRA,
            adapter/.
        policy: what names the new policy: digest of its weights, and how many updates led there.
        summary: figures that follow from the job.
        num_tokens: response tokens trained on, all epochs together.
    """

    folder: Path
    policy: dict[str, Any]
    summary: dict[str, Any]
    num_tokens: int


@dataclass(frozen=True)
class _Held:
    """What a state in memory is of: a policy, and what of it learns."""

    policy: str
    frozen: tuple[str, ...]
    lora: LoRAConfig | None


class Trainer:
    """Holds the student while it learns; one method, `train`."""

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        accelerator: Accelerator,
        *,
        student: str,
        work_dir: Path,
        device: str,
        max_batch_tokens: int,
        placement: TrainerConfig,
    ) -> None:
        """Set what does not depend on the round; nothing is loaded yet.

        Args:
            store: where rollouts, replays, weights and training states are read from.
            dataset: samples and images.
            accelerator: knows the processes, and the trackers that a round's figures are sent to.
            student: path of the model that round 1 starts from.
            work_dir: local folder for current weights.
            device: torch device of this process.
            max_batch_tokens: tokens of one forward batch, padding included; a prompt counts once for its responses,
                or once for each where the model takes no packed rows.
            placement: how the processes share the student.
        """
        self._store = store
        self._dataset = dataset
        self._accelerator = accelerator
        self._student = model_folder(student)
        self._work_dir = work_dir
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._placement = placement
        self._state: TrainingState | None = None
        self._held: _Held | None = None
        self._last: tuple[str, Update] | None = None
        self._written: set[str] = set()

    def train(self, job: TrainJob) -> Update:
        """Make the policy that follows `job.policy`; a job done last costs nothing again.

        Every process has to be given the same jobs; what comes back is whole on the main one alone.

        Raises:
            InputError: the optimizer's settings do not fit the student (`TrainingState`).
            StoreError: an input or every training state on the way is missing or damaged.
        """
        if self._last is not None and self._last[0] == job.key:
            return self._last[1]
        update = self._apply(job, self._hold(job))
        self._last = (job.key, update)
        return update

    # --- what is held -------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of model and optimizer, and end the trackers; no job may follow."""
        self._forget()
        # Not `end_training`, which would part the processes too.
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _forget(self) -> None:
        self._held = self._state = None

    def _hold(self, job: TrainJob) -> TrainingState:
        """Bring model and optimizer to the state after `job.policy`, what the job freezes included."""
        wanted = _held(job.policy.key, job.optimizer)
        if self._held == wanted and self._state is not None:
            return self._state
        self._forget()
        source = None
        if job.policy.stage == TrainJob.stage:
            source = self._find_state(job.policy)
            if source is None:
                self._repeat(job.policy)
                return self._hold(job)
        self._state = TrainingState(
            self._student,
            source,
            job.optimizer,
            dtype=job.engine.dtype,
            seed=job.seed,
            accelerator=self._accelerator,
            device=self._device,
            placement=self._placement,
        )
        self._held = wanted
        return self._state

    def _find_state(self, policy: ArtifactRef) -> Path | None:
        folder = self._work_dir / f"policy-{policy.key}"
        # What an earlier run left there may be cut short by a failing disk. All processes have to choose alike, also
        # where another machine does not have it.
        is_here = torch.tensor([policy.key in self._written and folder.is_dir()], device=self._device)
        if bool(self._accelerator.gather(is_here).all()):
            return folder
        checkpoint = self._store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
        if checkpoint is None or checkpoint.pruned:
            return None
        # One process of a machine fetches, the others find it there.
        with self._accelerator.local_main_process_first():
            return fetch_state(self._store, checkpoint.ref, self._work_dir)

    def _repeat(self, policy: ArtifactRef) -> None:
        job = TrainJob.model_validate(self._store.manifest(policy).job)
        state = self._hold(job)
        log.warning("repeating round %d: its weights are neither here nor in the store", job.round)
        update = self._apply(job, state)
        recorded = json.loads(self._store.read(policy, POLICY))
        if self._accelerator.is_main_process and update.policy != recorded:
            log.warning("round %d: weights %s differ from the recorded %s", job.round, update.policy, recorded)

    # --- one round ----------------------------------------------------------------------------------------------

    def _apply(self, job: TrainJob, state: TrainingState) -> Update:
        config = job.optimizer
        for group in state.optimizer.param_groups:
            group.update(betas=config.betas, weight_decay=config.weight_decay)
        rows = read_training_rows(job, self._store, self._dataset, state.processor)
        # From the first update on the state is neither the old policy's nor the new one's; a retry reloads.
        self._held = None
        old_logprobs, entropy = self._old_logprobs(state, rows, job)
        summary = divergences(rows, old_logprobs, entropy, config.importance_cap)
        losses, norms, skipped = [], [], 0
        for epoch in range(config.epochs):
            for mini_batch in mini_batches(rows, job, epoch):
                loss, norm = self._update(state, job, rows, mini_batch, old_logprobs)
                skipped += norm is None
                losses.append(loss)
                norms.append(norm)
        finite = [norm for norm in norms if norm is not None]
        summary |= {
            "loss": losses[0] if math.isfinite(losses[0]) else None,
            "grad_norm": sum(finite) / len(finite) if finite else None,
            "num_updates": state.num_updates,
            "num_skipped_updates": skipped,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
        }
        # Until the next round the device's room is the engine's.
        state.optimizer.zero_grad(set_to_none=True)
        folder = self._work_dir / f"policy-{job.key}"
        policy = state.save(folder)
        self._accelerator.wait_for_everyone()
        self._held = _held(job.key, config)
        self._written.add(job.key)
        if self._accelerator.is_main_process:
            self._forget_old(folder)
        self._accelerator.log({key: value for key, value in summary.items() if value is not None}, step=job.round)
        return Update(folder, policy, summary, config.epochs * sum(len(row.token_ids) for row in rows))

    def _forget_old(self, newest: Path) -> None:
        # The one before stays: a run that comes again right after a crash may still want it.
        others = [path for path in self._work_dir.glob("policy-*") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime)
        for path in (*others[:-1], *self._work_dir.glob("resumed-*")):
            shutil.rmtree(path, ignore_errors=True)

    @torch.no_grad()
    def _old_logprobs(
        self, state: TrainingState, rows: Sequence[TrainingRow], job: TrainJob
    ) -> tuple[Sequence[Tensor], float]:
        """Log-probs of every response under the policy as the round begins, and its mean entropy, nats."""
        # The prompts that this process trains on first, so that it encodes no others.
        own = [index for mini_batch in mini_batches(rows, job, 0) for index in self._share(rows, mini_batch)]
        batches, num_own = self._batches(state, rows, sorted(own), range(len(rows)))
        lengths = [len(row.token_ids) for row in rows]
        starts = list(accumulate(lengths, initial=0))
        # All log-probs one after the other, and the sum of the entropies: other processes add theirs to the zeros.
        found = torch.zeros(0)
        for number, batch in enumerate(batches):
            chosen = [rows[index] for index in batch]
            scores = self._scores(state, chosen)
            if number == 0:
                found = scores.logprobs.new_zeros(starts[-1] + 1)
            if number < num_own:
                found[-1] += scores.entropy.sum()
                for index, values in zip(batch, _split(scores.logprobs, chosen), strict=True):
                    found[starts[index] : starts[index + 1]] = values
        found = self._accelerator.reduce(found)
        return found[:-1].split(lengths), found[-1].item() / starts[-1]

    def _update(
        self,
        state: TrainingState,
        job: TrainJob,
        rows: Sequence[TrainingRow],
        mini_batch: Sequence[int],
        old_logprobs: Sequence[Tensor],
    ) -> tuple[float, float | None]:
        """One optimizer step; gives the loss and the gradient's norm, None where the step was skipped."""
        config, optimizer = job.optimizer, state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (state.num_updates + 1) / max(config.warmup_updates, 1))
        optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(rows[index].token_ids) for index in mini_batch)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        batches, num_own = self._batches(state, rows, self._share(rows, mini_batch), mini_batch)
        for number, batch in enumerate(batches):
            # DDP exchanges gradients once, with the last batch; FSDP2 after each, for it keeps its parts alone.
            with nullcontext() if number == len(batches) - 1 else self._accelerator.no_sync(state.policy):
                loss = self._loss(state, job, rows, batch, old_logprobs, len(mini_batch), num_tokens)
                if number >= num_own:
                    loss = 0.0 * loss
                # Both give the mean of the processes' gradients.
                (loss * self._accelerator.num_processes).backward()
            total += loss.detach()
        loss = self._accelerator.reduce(total).item()
        norm = torch.nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not bool(torch.isfinite(norm)):
            log.warning("round %d: the gradient is not finite; this update is skipped", job.round)
            return loss, None
        optimizer.step()
        state.num_updates += 1
        return loss, norm.item()

    def _share(self, rows: Sequence[TrainingRow], mini_batch: Sequence[int]) -> list[int]:
        return share_of(rows, mini_batch, self._accelerator.process_index, self._accelerator.num_processes)

    def _batches(
        self, state: TrainingState, rows: Sequence[TrainingRow], own: Sequence[int], everything: Sequence[int]
    ) -> tuple[list[list[int]], int]:
        """Cut this process's rows into forward batches, as many as on any process: all exchange what they hold in step.

        Returns:
            Forward batches, and how many of them count; those after these are computed without effect.
        """
        batches = micro_batches(rows, own, self._max_batch_tokens, shared=state.packed)
        num_own = len(batches)
        most = int(self._accelerator.gather(torch.tensor([num_own], device=self._device)).max())
        if num_own < most:
            spare = [batches[0] if batches else list(everything[:1])]
            batches += spare * (most - num_own)
        return batches, num_own

    def _loss(
        self,
        state: TrainingState,
        job: TrainJob,
        rows: Sequence[TrainingRow],
        batch: Sequence[int],
        old_logprobs: Sequence[Tensor],
        num_responses: int,
        num_tokens: int,
    ) -> Tensor:
        chosen = [rows[index] for index in batch]
        topk = None
        if isinstance(job.loss, ForwardKLTopKLoss):
            topk_ids = torch.tensor([ids for row in chosen for ids in row.topk_ids], device=self._device)
            scores = self._scores(state, chosen, topk_ids)
            topk = TopK(
                policy_logprobs=self._pad(_split(scores.topk_logprobs, chosen)),
                policy_rest=self._pad(_split(scores.rest, chosen)),
                teacher_logprobs=self._pad([torch.tensor(row.topk_logprobs) for row in chosen]),
            )
        else:
            scores = self._scores(state, chosen)
        mask = self._pad([torch.ones(len(row.token_ids), dtype=torch.bool) for row in chosen])
        old = self._pad([old_logprobs[index] for index in batch])
        weights = self._pad([torch.tensor(row.weights) for row in chosen])
        if job.optimizer.importance_cap is not None:
            sampler = self._pad([torch.tensor(row.sampler_logprobs) for row in chosen])
            weights = weights * importance_weights(old, sampler, mask, job.optimizer.importance_cap)
        return gated_distillation_loss(
            job.loss,
            policy_logprobs=self._pad(_split(scores.logprobs, chosen)),
            teacher_logprobs=self._pad([torch.tensor(row.teacher_logprobs) for row in chosen]),
            response_mask=mask,
            weights=weights if weights.shape == mask.shape else weights[:, 0],
            num_responses=num_responses,
            num_tokens=num_tokens,
            old_logprobs=old,
            topk=topk,
        )

    def _scores(self, state: TrainingState, rows: Sequence[TrainingRow], topk_ids: Tensor | None = None) -> TokenScores:
        """Score the tokens of a forward batch, one response after the other, without padding."""
        responses = pad_right([row.token_ids for row in rows], state.pad_id).to(self._device)
        lengths = torch.tensor([len(row.token_ids) for row in rows], device=self._device)
        mask = torch.arange(responses.shape[1], device=self._device) < lengths[:, None]
        prompts = list({row.sample_id: row.prompt.inputs for row in rows}.values())
        with state.autocast:
            scores: TokenScores = state.policy(prompts, responses, mask, topk_ids)
        return scores

    def _pad(self, values: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True).to(self._device)


def fetch_state(store: Store, checkpoint: ArtifactRef, work_dir: Path) -> Path:
    """Give the local folder of a stored state; it is fetched where it is not there."""
    folder = work_dir / f"resumed-{checkpoint.key}"
    if not folder.is_dir():
        store.fetch(checkpoint, "", folder)
    return folder


def _held(policy: str, config: OptimizerConfig) -> _Held:
    return _Held(policy, config.frozen, config.lora)


def _split(values: Tensor, rows: Sequence[TrainingRow]) -> tuple[Tensor, ...]:
    """Cut the values of a forward batch's tokens apart by response."""
    return torch.split(values, [len(row.token_ids) for row in rows])
