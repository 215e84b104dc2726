"""Adapters: they learn alone, are stored as PEFT does, and what is served computes as they do."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.plain import plain_logits
from support.training import K2, OPTIMIZER, TOP_K_LOSS, TrainingWorld
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tasks.adapters.lora import WEIGHTS, add_adapters
from tasks.adapters.models import load_model
from tasks.adapters.trainer import Trainer, Update
from tasks.adapters.training_data import read_training_rows
from tasks.artifacts import ArtifactRef
from tasks.config import LoRAConfig, OptimizerConfig
from vzero_core.errors import InputError

LORA = LoRAConfig(rank=2, alpha=6.0)
DECODER = r".*language_model.*\.(q_proj|down_proj)"


def optimizer(lora: LoRAConfig = LORA, frozen: tuple[str, ...] = ()) -> OptimizerConfig:
    return OPTIMIZER.model_copy(update={"lora": lora, "frozen": frozen})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    return model


def rounds(world: TrainingWorld, trainer: Trainer, last: int, *, config: OptimizerConfig) -> Update:
    policy = None
    for number in range(1, last + 1):
        job = world.job(round=number, policy=policy, loss=TOP_K_LOSS, optimizer=config)
        update = trainer.train(job)
        policy = ArtifactRef(stage="train", key=job.key, digest="any")
    return update


@pytest.fixture
def world(folders: dict[str, Path], tmp_path: Path) -> TrainingWorld:
    return TrainingWorld(folders["qwen3_vl"], tmp_path)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "idefics3"])
def test_what_is_served_is_what_peft_merges(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    world = TrainingWorld(folders[family], tmp_path)
    update = rounds(world, world.trainer(), 2, config=optimizer())
    served = opened(update.folder / "model")
    adapted = PeftModel.from_pretrained(opened(folders[family]), str(update.folder / "adapter"))
    row = read_training_rows(world.job(), world.store, world.dataset, world.processor)[0]
    with torch.no_grad():
        found = plain_logits(served, row.prompt.inputs, row.token_ids)
        first = plain_logits(opened(folders[family]), row.prompt.inputs, row.token_ids)
        apart = plain_logits(adapted, row.prompt.inputs, row.token_ids)
    # Norms compute in float32 inside these models.
    assert (found - apart).abs().max() <= 1e-4
    assert (found - first).abs().max() > 0.05
    merged = adapted.merge_and_unload().state_dict()
    assert merged.keys() == served.state_dict().keys()
    for name, tensor in served.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


def test_only_what_is_aimed_at_learns(world: TrainingWorld, folders: dict[str, Path]) -> None:
    update = world.trainer().train(world.job(optimizer=optimizer(LoRAConfig(rank=2, target=DECODER))))
    before, after = weights(folders["qwen3_vl"]), weights(update.folder / "model")
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor.double())}
    assert moved == {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))}
    moments = load_file(update.folder / "state" / "optimizer.safetensors")
    assert {name.rpartition(".")[0].rpartition(".lora_")[1] for name in moments} == {".lora_"}


def test_frozen_parts_have_no_adapter_that_learns(world: TrainingWorld, folders: dict[str, Path]) -> None:
    update = world.trainer().train(world.job(optimizer=optimizer(frozen=("model.visual.*",))))
    before, after = weights(folders["qwen3_vl"]), weights(update.folder / "model")
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor.double())}
    assert moved
    assert not any(name.startswith("model.visual.") for name in moved)


def test_forward_batches_do_not_matter(world: TrainingWorld) -> None:
    job = world.job(optimizer=optimizer(), loss=K2)
    whole, cut = world.trainer("whole").train(job), world.trainer("cut", max_batch_tokens=1).train(job)
    expected = weights(whole.folder / "model")
    for name, tensor in weights(cut.folder / "model").items():
        # Norms compute in float32 inside these models.
        assert (tensor - expected[name]).norm() <= 1e-6 * tensor.norm(), name


def test_another_trainer_makes_the_same_bytes(world: TrainingWorld) -> None:
    updates = [rounds(world, world.trainer(name), 2, config=optimizer()) for name in ("one", "two")]
    assert updates[0].policy == updates[1].policy
    for part in (f"adapter/{WEIGHTS}", "adapter/adapter_config.json", "state/optimizer.safetensors"):
        assert (updates[0].folder / part).read_bytes() == (updates[1].folder / part).read_bytes(), part
    config = json.loads((updates[0].folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6.0, "all-linear")


def test_other_seeds_draw_other_adapters(folders: dict[str, Path]) -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = load_model(folders["qwen3_vl"], "float32", "cpu")
        before = torch.get_rng_state()
        add_adapters(model, LORA, seed)
        assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are drawn"
        return {name: tensor for name, tensor in model.state_dict().items() if ".lora_A." in name}

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one
    assert all(torch.equal(again[name], tensor) for name, tensor in one.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_layer", "must fit linear layers of the student, got 'no_such_layer'"),
        ("(", r"must fit linear layers of the student, got '\('"),
        (".*embed_tokens", "not the output layer, got '.*embed_tokens', which fits model.language_model.embed_tokens"),
        ("lm_head", "not the output layer, got 'lm_head', which fits lm_head"),
        (".*patch_embed.proj", "linear layers alone"),
    ],
)
def test_a_target_that_cannot_be_merged_is_refused(target: str, message: str, world: TrainingWorld) -> None:
    with pytest.raises(InputError, match=message):
        world.trainer().train(world.job(optimizer=optimizer(LoRAConfig(target=target))))
