"""Student and optimizer while they learn: loaded, shared among processes, stored without pickle.

What is stored does not depend on the number of processes: every tensor is written whole, by its parameter's name.
"""

import fnmatch
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.adapters.lora import add_adapters, load_adapters, merge, save_adapters
from tasks.adapters.models import CONFIG_SUFFIXES, load_model, weights_digest
from tasks.adapters.policy_model import PolicyModel
from tasks.adapters.prompts import PromptProcessor, banned_ids, end_of_turn_ids
from tasks.artifacts import digest_json
from tasks.config import OptimizerConfig, PromptConfig, TrainerConfig
from vzero_core.errors import InputError

log = logging.getLogger("vzero.trainer")

MOMENTS, PROGRESS = "state/optimizer.safetensors", "state/progress.json"
CHECK_SIZE, CHECK_TOKENS = (64, 64), 4
"""Picture in pixels, and tokens a response, of the input by which packed rows are checked."""


class TrainingState:
    """A student with its optimizer, whole on every process or in parts.

    Weights and moments are float32 also where the arithmetic is bfloat16: an update is smaller than the gap between
    two bfloat16 numbers, and would be lost.

    Attributes:
        policy: the student as a module that scores; all calls go through it.
        optimizer: AdamW over all parameters; those that are fixed never have a gradient.
        processor: of the student.
        pad_id: a text token to fill up with.
        packed: whether a prompt is computed once for its responses.
        autocast: of every forward pass.
        num_updates: optimizer steps so far.
    """

    def __init__(
        self,
        student: Path,
        source: Path | None,
        config: OptimizerConfig,
        *,
        dtype: str,
        seed: int,
        accelerator: Accelerator,
        device: str,
        placement: TrainerConfig,
    ) -> None:
        """Load the first student, or what `save` wrote.

        Args:
            student: model folder that round 1 starts from.
            source: folder of a later state; None for the first.
            config: what learns: `frozen` and `lora`.
            dtype: arithmetic.
            seed: of the run.
            accelerator: knows the processes.
            device: of this process.
            placement: how the processes share the student.

        Raises:
            InputError: `frozen` has a pattern without a parameter, or leaves none to train; `lora` fits no layer; the
                student's layers cannot be computed again.
        """
        self._student, self._config, self._accelerator, self._device = student, config, accelerator, device
        mixed = dtype == "bfloat16"
        weights = student if source is None or config.lora is not None else source / "model"
        self._model = load_model(weights, "float32" if mixed else dtype, "cpu")
        if config.lora is not None:
            add_adapters(self._model, config.lora, int(digest_json([seed, "lora"]), 16) % 2**63)
            if source is not None:
                load_adapters(self._model, source / "adapter")
        _freeze(self._model, config.frozen)
        if placement.gradient_checkpointing:
            _checkpoint_layers(self._model)
        self.processor = PromptProcessor(student)
        ends = end_of_turn_ids(self._model.generation_config, self.processor)
        self.pad_id = ends[0]
        policy = PolicyModel(self._model)
        self.policy = _wrapped(policy, device, placement)
        self._try_packing(policy, ends)
        self.packed = policy.packed
        # Each weight is used once in a pass: to remember its bfloat16 copy would only take room.
        kind = torch.device(device).type
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=mixed, cache_enabled=False)
        self.optimizer = torch.optim.AdamW(self._model.parameters())
        self.num_updates = 0
        if source is not None:
            self._load_moments(source)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters; under FSDP2 this process's parts of them."""
        return list(self._model.parameters())

    def save(self, folder: Path) -> dict[str, Any]:
        """Write model/ (a Hugging Face folder), state/ and, with LoRA, adapter/; every process has to call this.

        Returns:
            What names the policy: digest of its weights, and how many updates led there; empty but on the main process.
        """
        state = self._gather(self._model.state_dict(keep_vars=True))
        moments = self._gather(
            {
                f"{name}.{key}": value
                for name, parameter in self._model.named_parameters()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
        )
        if not self._accelerator.is_main_process:
            return {}
        lora = self._config.lora
        weights = state if lora is None else merge(state, lora)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        for path in self._student.iterdir():
            # The weights' index is not taken over: the new weights may be cut into other files.
            if path.is_file() and path.suffix in CONFIG_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copy(path, partial / "model")
        self._model.save_pretrained(partial / "model", state_dict=dict(weights))
        if lora is not None:
            save_adapters(state, lora, partial / "adapter")
        (partial / "state").mkdir()
        save_file(moments, partial / MOMENTS)
        (partial / PROGRESS).write_text(json.dumps({"num_updates": self.num_updates}))
        # What lies there already is of an attempt that did not end, perhaps with other last bits.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return {"weights": weights_digest(weights), "num_updates": self.num_updates}

    def _gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put tensors together from the parts; every process takes part, the main one alone keeps them."""
        gathered: dict[str, Tensor] = {}
        # What has two names, as a tied output layer, stays one.
        seen: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in seen:
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                seen[id(tensor)] = (
                    whole.detach().cpu().contiguous() if self._accelerator.is_main_process else whole.new_empty(0)
                )
            gathered[name] = seen[id(tensor)]
        return gathered

    def _load_moments(self, source: Path) -> None:
        self.num_updates = json.loads((source / PROGRESS).read_text())["num_updates"]
        moments = load_file(source / MOMENTS)
        for name, parameter in self._model.named_parameters():
            if f"{name}.exp_avg" in moments:
                self.optimizer.state[parameter] = {"step": moments[f"{name}.step"]} | {
                    key: _like(moments[f"{name}.{key}"], parameter) for key in ("exp_avg", "exp_avg_sq")
                }

    def _try_packing(self, policy: PolicyModel, end_ids: Sequence[int]) -> None:
        picture = Image.new("RGB", CHECK_SIZE)
        prompt = self.processor.encode(self.processor.prompt("?", [picture], PromptConfig()))
        banned = set(banned_ids(self._model.config, self.processor, end_ids))
        words = torch.tensor(list(islice((token for token in count() if token not in banned), CHECK_TOKENS)))
        if not policy.try_packing(self.policy, prompt, torch.stack([words, words.flip(0)]).to(self._device)):
            log.warning("the student's prompts are computed once for each response: packed rows would differ")


def _freeze(model: PreTrainedModel, frozen: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for rule in frozen:
        if not fnmatch.filter(names, rule):
            raise InputError(f"optimizer.frozen must name parameters, but {rule!r} fits none, such as {names[0]!r}")
    fixed = {name for rule in frozen for name in fnmatch.filter(names, rule)}
    for name, parameter in model.named_parameters():
        # A parameter without a gradient is passed over: neither moments nor weight decay touch it.
        parameter.requires_grad_(parameter.requires_grad and name not in fixed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"optimizer.frozen must leave parameters to train, got {frozen}; freeze fewer")


def _checkpoint_layers(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"placement.trainer.gradient_checkpointing must be false for {type(model).__name__}, which does not know it"
        )
    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # The layer's own flag alone: in training mode its parts would drop out activations.
            module.training = True


def _wrapped(policy: PolicyModel, device: str, placement: TrainerConfig) -> nn.Module:
    """Put the student where it computes, alone or shared among processes."""
    if placement.sharding == "fsdp2":
        # Moved part by part, so that no device ever holds the whole.
        mesh = init_device_mesh(torch.device(device).type, (placement.total_processes,))
        for module in policy.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, mesh=mesh)
        # Left whole after a pass without gradients, these would be other parameters than the optimizer's.
        fully_shard(policy, mesh=mesh, reshard_after_forward=True)
        return policy
    policy.to(device)
    if placement.total_processes == 1:
        return policy
    return DistributedDataParallel(policy, device_ids=None if device == "cpu" else [device])


def _like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
