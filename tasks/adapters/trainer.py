"""The trainer: a job in, updated weights out.

Between calls it holds the last policy's weights and optimizer state. Given a job on another policy it goes back to the
nearest stored training state and repeats the rounds since then from their stored rollouts.
"""

import fnmatch
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tasks.adapters.dataset import Dataset
from tasks.adapters.forward import response_logits
from tasks.adapters.models import CONFIG_SUFFIXES, load_model, model_folder, weights_digest
from tasks.adapters.output_layer import TokenScores, score_logits, score_tokens
from tasks.adapters.packed import packed_hidden, shares_prompt_exactly
from tasks.adapters.prompts import PromptProcessor, banned_ids, end_of_turn_ids
from tasks.adapters.store import Store
from tasks.adapters.training_data import (
    CheckpointJob,
    TrainingRow,
    TrainJob,
    divergences,
    micro_batches,
    mini_batches,
    read_training_rows,
)
from tasks.adapters.transformers_engine import pad_right
from tasks.artifacts import ArtifactRef
from tasks.config import EngineFingerprint, OptimizerConfig, PromptConfig
from vzero_core.config import ForwardKLTopKLoss
from vzero_core.errors import InputError
from vzero_core.importance import importance_weights
from vzero_core.losses import TopK, gated_distillation_loss

log = logging.getLogger("vzero.trainer")

POLICY = "policy.json"
CHECK_SIZE, CHECK_TOKENS = (64, 64), 4
"""Picture in pixels, and tokens a response, of the input by which packed rows are checked."""


@dataclass(frozen=True)
class Update:
    """What a job made.

    Attributes:
        folder: local folder with model/ (a Hugging Face folder) and state/ (optimizer and counters).
        policy: what names the new policy: digest of its weights, and how many updates led there.
        summary: figures that follow from the job.
        num_tokens: response tokens trained on, all epochs together.
    """

    folder: Path
    policy: dict[str, Any]
    summary: dict[str, Any]
    num_tokens: int


class Trainer:
    """Holds the student while it learns; one method, `train`.

    Weights and moments are float32 also where the arithmetic is bfloat16: an update is smaller than the gap between
    two bfloat16 numbers, and would be lost.
    """

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        *,
        student: str,
        work_dir: Path,
        device: str,
        max_batch_tokens: int,
    ) -> None:
        """Set what does not depend on the round; nothing is loaded yet.

        Args:
            store: where rollouts, replays, weights and training states are read from.
            dataset: samples and images.
            student: path of the model that round 1 starts from.
            work_dir: local folder for current weights.
            device: torch device.
            max_batch_tokens: tokens of one forward batch, padding included; a prompt counts once for its responses,
                or once for each where the model takes no packed rows.
        """
        self._store = store
        self._dataset = dataset
        self._student = model_folder(student)
        self._work_dir = work_dir
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._held: str | None = None
        self._last: tuple[str, Update] | None = None
        self._model: PreTrainedModel
        self._processor: PromptProcessor
        self._optimizer: torch.optim.AdamW
        self._autocast: torch.autocast
        self._pad_id = 0
        self._num_updates = 0
        self._shared = False

    def train(self, job: TrainJob) -> Update:
        """Make the policy that follows `job.policy`; a job done last costs nothing again.

        Raises:
            InputError: `optimizer.frozen` has a pattern without a parameter, or leaves none to train.
            StoreError: an input or every training state on the way is missing or damaged.
        """
        if self._last is not None and self._last[0] == job.key:
            return self._last[1]
        self._hold(job)
        update = self._apply(job)
        self._last = (job.key, update)
        return update

    # --- what is held -------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of model and optimizer; a round after this one loads them again."""
        self._held = None
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_optimizer", None)

    def _hold(self, job: TrainJob) -> None:
        """Bring model and optimizer to the state after `job.policy`."""
        if self._held == job.policy.key:
            return
        self._held = None
        pending: list[tuple[ArtifactRef, TrainJob]] = []
        policy = job.policy
        while policy.stage == TrainJob.stage:
            checkpoint = self._store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
            if checkpoint is not None and not checkpoint.pruned:
                self._load_checkpoint(checkpoint.ref, job.engine)
                break
            earlier = TrainJob.model_validate(self._store.manifest(policy).job)
            pending.append((policy, earlier))
            policy = earlier.policy
        else:
            self._load(self._student, job.engine)
        for policy, earlier in reversed(pending):
            log.warning("repeating round %d: its weights are neither here nor in the store", earlier.round)
            update = self._apply(earlier)
            recorded = json.loads(self._store.read(policy, POLICY))
            if update.policy != recorded:
                log.warning("round %d: weights %s differ from the recorded %s", earlier.round, update.policy, recorded)
        self._held = job.policy.key

    def _load(self, folder: Path, engine: EngineFingerprint) -> None:
        mixed = engine.dtype == "bfloat16"
        self._model = load_model(folder, "float32" if mixed else engine.dtype, self._device)
        self._autocast = torch.autocast(self._model.device.type, torch.bfloat16, enabled=mixed)
        self._processor = PromptProcessor(folder)
        ends = end_of_turn_ids(self._model.generation_config, self._processor)
        self._pad_id = ends[0]
        self._shared = self._shares_prompt(ends)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._num_updates = 0

    def _shares_prompt(self, end_ids: Sequence[int]) -> bool:
        picture = Image.new("RGB", CHECK_SIZE)
        prompt = self._processor.encode(self._processor.prompt("?", [picture], PromptConfig()))
        banned = set(banned_ids(self._model.config, self._processor, end_ids))
        words = torch.tensor(list(islice((token for token in count() if token not in banned), CHECK_TOKENS)))
        shared = shares_prompt_exactly(self._model, prompt, torch.stack([words, words.flip(0)]))
        if not shared:
            log.warning("the student's prompts are computed once for each response: packed rows would differ")
        return shared

    def _load_checkpoint(self, ref: ArtifactRef, engine: EngineFingerprint) -> None:
        folder = self._work_dir / f"resumed-{ref.key}"
        if not folder.is_dir():
            self._store.fetch(ref, "model", folder)
        self._load(folder, engine)
        self._num_updates = json.loads(self._store.read(ref, "state/progress.json"))["num_updates"]
        moments = load(self._store.read(ref, "state/optimizer.safetensors"))
        for name, parameter in self._model.named_parameters():
            if f"{name}.exp_avg" in moments:
                self._optimizer.state[parameter] = {
                    key: moments[f"{name}.{key}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def _save(self, folder: Path) -> None:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        for path in self._student.iterdir():
            # The weights' index is not taken over: the new weights may be cut into other files.
            if path.is_file() and path.suffix in CONFIG_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copy(path, partial / "model")
        self._model.save_pretrained(partial / "model")
        (partial / "state").mkdir()
        moments = {
            f"{name}.{key}": value.contiguous()
            for name, parameter in self._model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, partial / "state" / "optimizer.safetensors")
        (partial / "state" / "progress.json").write_text(json.dumps({"num_updates": self._num_updates}))
        # What lies there already is of an attempt that did not end, perhaps with other last bits.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    # --- one round ----------------------------------------------------------------------------------------------

    def _apply(self, job: TrainJob) -> Update:
        self._configure(job.optimizer)
        rows = read_training_rows(job, self._store, self._dataset, self._processor)
        # From the first update on the state is neither the old policy's nor the new one's; a retry reloads.
        self._held = None
        old_logprobs, entropy = self._old_logprobs(rows)
        summary = divergences(rows, old_logprobs, entropy, job.optimizer.importance_cap)
        losses, norms, skipped = [], [], 0
        for epoch in range(job.optimizer.epochs):
            for mini_batch in mini_batches(rows, job, epoch):
                loss, norm = self._update(job, rows, mini_batch, old_logprobs)
                skipped += norm is None
                losses.append(loss)
                norms.append(norm)
        finite = [norm for norm in norms if norm is not None]
        summary |= {
            "loss": losses[0] if math.isfinite(losses[0]) else None,
            "grad_norm": sum(finite) / len(finite) if finite else None,
            "num_updates": self._num_updates,
            "num_skipped_updates": skipped,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
        }
        # Until the next round the device's room is the engine's.
        self._optimizer.zero_grad(set_to_none=True)
        folder = self._work_dir / f"policy-{job.key}"
        self._save(folder)
        policy = {"weights": weights_digest(self._model), "num_updates": self._num_updates}
        self._held = job.key
        self._forget_old(folder)
        return Update(folder, policy, summary, job.optimizer.epochs * sum(len(row.token_ids) for row in rows))

    def _configure(self, config: OptimizerConfig) -> None:
        """Set what the job says of the optimizer, so that nothing of an earlier job stays in force."""
        names = [name for name, _ in self._model.named_parameters()]
        for rule in config.frozen:
            if not fnmatch.filter(names, rule):
                raise InputError(f"optimizer.frozen must name parameters, but {rule!r} fits none, such as {names[0]!r}")
        frozen = {name for rule in config.frozen for name in fnmatch.filter(names, rule)}
        if len(frozen) == len(names):
            raise InputError(f"optimizer.frozen must leave parameters to train, got {config.frozen}; freeze fewer")
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        # A parameter without a gradient is passed over: neither moments nor weight decay touch it.
        for group in self._optimizer.param_groups:
            group.update(betas=config.betas, weight_decay=config.weight_decay)

    def _forget_old(self, newest: Path) -> None:
        # The one before stays: a run that comes again right after a crash may still want it.
        others = [path for path in self._work_dir.glob("policy-*") if path != newest]
        others.sort(key=lambda path: path.stat().st_mtime)
        for path in (*others[:-1], *self._work_dir.glob("resumed-*")):
            shutil.rmtree(path, ignore_errors=True)

    @torch.no_grad()
    def _old_logprobs(self, rows: Sequence[TrainingRow]) -> tuple[dict[int, Tensor], float]:
        """Log-probs of all responses under the policy as the round begins, and its mean entropy, nats."""
        found: dict[int, Tensor] = {}
        entropy = 0.0
        for batch in micro_batches(rows, range(len(rows)), self._max_batch_tokens, shared=self._shared):
            chosen = [rows[index] for index in batch]
            scores = self._scores(chosen)
            entropy += scores.entropy.sum().item()
            found |= zip(batch, _split(scores.logprobs, chosen), strict=True)
        return found, entropy / sum(len(row.token_ids) for row in rows)

    def _update(
        self, job: TrainJob, rows: Sequence[TrainingRow], mini_batch: Sequence[int], old_logprobs: dict[int, Tensor]
    ) -> tuple[float, float | None]:
        """One optimizer step; gives the loss and the gradient's norm, None where the step was skipped."""
        config = job.optimizer
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (self._num_updates + 1) / max(config.warmup_updates, 1))
        self._optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(rows[index].token_ids) for index in mini_batch)
        total = 0.0
        for batch in micro_batches(rows, mini_batch, self._max_batch_tokens, shared=self._shared):
            loss = self._loss(job, rows, batch, old_logprobs, len(mini_batch), num_tokens)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            log.warning("round %d: the gradient is not finite; this update is skipped", job.round)
            return total, None
        self._optimizer.step()
        self._num_updates += 1
        return total, norm.item()

    def _loss(
        self,
        job: TrainJob,
        rows: Sequence[TrainingRow],
        batch: Sequence[int],
        old_logprobs: dict[int, Tensor],
        num_responses: int,
        num_tokens: int,
    ) -> Tensor:
        chosen = [rows[index] for index in batch]
        topk = None
        if isinstance(job.loss, ForwardKLTopKLoss):
            topk_ids = torch.tensor([ids for row in chosen for ids in row.topk_ids], device=self._device)
            scores = self._scores(chosen, topk_ids)
            topk = TopK(
                policy_logprobs=self._pad(_split(scores.topk_logprobs, chosen)),
                policy_rest=self._pad(_split(scores.rest, chosen)),
                teacher_logprobs=self._pad([torch.tensor(row.topk_logprobs) for row in chosen]),
            )
        else:
            scores = self._scores(chosen)
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

    def _scores(self, rows: Sequence[TrainingRow], topk_ids: Tensor | None = None) -> TokenScores:
        """Score the tokens of a forward batch, one response after the other, without padding."""
        responses = pad_right([row.token_ids for row in rows], self._pad_id).to(self._device)
        lengths = torch.tensor([len(row.token_ids) for row in rows], device=self._device)
        mask = torch.arange(responses.shape[1], device=self._device) < lengths[:, None]
        with self._autocast:
            if self._shared:
                prompts = list({row.sample_id: row.inputs for row in rows}.values())
                hidden = packed_hidden(self._model, prompts, responses)[mask]
                return score_tokens(hidden, self._model.get_output_embeddings().weight, responses[mask], topk_ids)
            logits = response_logits(self._model, [row.inputs for row in rows], responses)
        return score_logits(logits[mask], responses[mask], topk_ids)

    def _pad(self, values: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True).to(self._device)


def _split(values: Tensor, rows: Sequence[TrainingRow]) -> tuple[Tensor, ...]:
    """Cut the values of a forward batch's tokens apart by response."""
    return torch.split(values, [len(row.token_ids) for row in rows])
