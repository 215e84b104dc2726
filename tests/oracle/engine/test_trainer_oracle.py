"""The trainer against the formulas written out: one response at a time, whole forward passes, torch's own AdamW."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.plain import plain_logits, plain_logprobs
from support.training import TOP_K_LOSS, TrainingWorld
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tasks.adapters import training_state
from tasks.adapters.models import load_model
from tasks.adapters.policy_model import PolicyModel
from tasks.adapters.tables import read_rows
from tasks.adapters.training_data import TrainingRow, TrainJob, mini_batches, read_training_rows
from tasks.artifacts import Rollout
from tasks.config import OptimizerConfig
from vzero_core.config import ForwardKLTopKLoss, Loss, PolicyGradientLoss, SampledLoss, preset

RELEASE = preset("release").loss
PAPER = preset("paper").loss
LOSSES: dict[str, Loss] = {
    "paper": PAPER,
    "release": RELEASE,
    "k2": SampledLoss(estimator="k2"),
    "top-k": TOP_K_LOSS,
    "top-k, token mean": ForwardKLTopKLoss(k=TOP_K_LOSS.k, aggregation="token_mean"),
}


def token_losses(loss: Loss, logits: Tensor, row: TrainingRow, old: Tensor) -> Tensor:
    """The formulas of docs and papers, for one response; [T]."""
    logprobs = logits.log_softmax(-1)
    s = logprobs.gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0]
    t = torch.tensor(row.teacher_logprobs)
    if isinstance(loss, SampledLoss):
        assert loss.estimator == "k2"
        return (s - t) ** 2 / 2
    if isinstance(loss, PolicyGradientLoss):
        k1 = (s - t).detach()
        if loss.ppo is None:
            return k1 * s
        advantage = -k1.clamp(-10, 10)
        ratio = torch.exp((s - old).clamp(-20, 20))
        objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -torch.where(advantage < 0, torch.maximum(objective, 3 * advantage), objective)
    terms = []
    for position, (ids, values) in enumerate(zip(row.topk_ids, row.topk_logprobs, strict=True)):
        p = torch.tensor(values, dtype=torch.float64).exp()
        q = logprobs[position].exp()
        others = [token for token in range(logits.shape[-1]) if token not in ids]
        rest_p, rest_q = 1 - p.sum(), q[others].sum()
        terms.append((p * (p / q[list(ids)]).log()).sum() + rest_p * (rest_p / rest_q).log())
    return torch.stack(terms)


def reference(
    world: TrainingWorld, job: TrainJob, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[tuple[float, float, float]]]:
    """Train a plain copy of the student on a job's rows; gives it, and each update's loss, norm and learning rate."""
    model = AutoModelForImageTextToText.from_pretrained(world.student, dtype=dtype)
    config = job.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    with torch.no_grad():
        old = [
            plain_logits(model, row.prompt.inputs, row.token_ids)
            .log_softmax(-1)
            .gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0]
            for row in rows
        ]
    updates = []
    for epoch in range(config.epochs):
        for batch in mini_batches(rows, job, epoch):
            rate = config.learning_rate * min(1, (len(updates) + 1) / config.warmup_updates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            num_tokens = sum(len(rows[index].token_ids) for index in batch)
            total = 0.0
            for index in batch:
                row = rows[index]
                losses = token_losses(job.loss, plain_logits(model, row.prompt.inputs, row.token_ids), row, old[index])
                weighted = losses * torch.tensor(row.weights)
                if config.importance_cap is not None:
                    sampled = torch.tensor(row.sampler_logprobs, dtype=torch.float64).exp()
                    weighted = weighted * (old[index].exp() / sampled).clamp(max=config.importance_cap)
                denominator = num_tokens if job.loss.aggregation == "token_mean" else len(batch) * len(row.token_ids)
                loss = weighted.sum() / denominator
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            updates.append((total, norm.item(), rate))
            optimizer.step()
    return model, updates


def distance(folder: Path, model: PreTrainedModel, start: Path) -> tuple[float, float]:
    """Largest difference between two models' weights, and the largest between the second and where both began."""
    found, initial = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64).state_dict() for path in (folder, start)
    )
    expected = model.double().state_dict()
    assert set(found) == set(expected)
    return (
        max((found[name] - tensor).abs().max().item() for name, tensor in expected.items()),
        # A bias on all keys changes nothing, and is left where it was.
        min(
            (initial[name] - tensor).abs().max().item()
            for name, tensor in expected.items()
            if not name.endswith("k_proj.bias")
        ),
    )


OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, weight_decay=0.1, warmup_updates=3, mini_batches=2, epochs=2, max_grad_norm=0.5
)


@pytest.mark.parametrize("weights", ["response", "token"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_round_equals_the_formulas(
    loss: Loss, weights: Any, folders: dict[str, Path], tmp_path: Path, float64_throughout: None
) -> None:
    """Four updates: two mini-batches, two epochs, so that from the second on the policy is not the old one."""
    world = TrainingWorld(folders["qwen3_vl"], tmp_path)
    job = world.job(loss=loss, weights=weights, optimizer=OPTIMIZER)
    update = world.trainer().train(job)
    model, updates = reference(world, job, torch.float64)
    error, moved = distance(update.folder / "model", model, world.student)
    assert moved > 1e-3
    assert error <= 1e-10
    assert update.summary["num_updates"] == update.policy["num_updates"] == len(updates) == 4
    assert update.summary["loss"] == pytest.approx(updates[0][0], rel=1e-9)
    norms = [norm for _, norm, _ in updates]
    assert max(norms) > OPTIMIZER.max_grad_norm
    assert update.summary["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-8)
    assert update.summary["learning_rate"] == updates[-1][2] == OPTIMIZER.learning_rate
    assert updates[0][2] == pytest.approx(OPTIMIZER.learning_rate / 3)


CAPPED = OPTIMIZER.model_copy(update={"importance_cap": 1.25})


def other_engine(world: TrainingWorld, job: TrainJob) -> TrainJob:
    """The job with responses that another engine sampled: its log-probs are now above, now below the student's."""
    model = AutoModelForImageTextToText.from_pretrained(world.student, dtype=torch.float64)
    random = torch.Generator().manual_seed(5)
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    with torch.no_grad():
        own = [plain_logprobs(model, row.prompt.inputs, row.token_ids) for row in rows]
    return world.with_sampler_logprobs(
        job, [values + 0.5 * torch.randn(len(values), generator=random) for values in own]
    )


@pytest.mark.parametrize("weights", ["response", "token"])
@pytest.mark.parametrize("loss", [PAPER, RELEASE, TOP_K_LOSS], ids=["paper", "release", "top-k"])
def test_a_round_with_importance_weights_equals_the_formulas(
    loss: Loss, weights: Any, folders: dict[str, Path], tmp_path: Path, float64_throughout: None
) -> None:
    world = TrainingWorld(folders["qwen3_vl"], tmp_path)
    job = other_engine(world, world.job(loss=loss, weights=weights, optimizer=CAPPED))
    update = world.trainer().train(job)
    model, updates = reference(world, job, torch.float64)
    error, moved = distance(update.folder / "model", model, world.student)
    assert moved > 1e-3
    assert error <= 1e-10
    assert update.summary["loss"] == pytest.approx(updates[0][0], rel=1e-9)
    assert 0.2 < update.summary["importance_capped_share"] < 0.8


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "idefics3"])
def test_other_families_equal_the_formulas(
    family: str, folders: dict[str, Path], tmp_path: Path, float64_throughout: None
) -> None:
    world = TrainingWorld(folders[family], tmp_path)
    job = world.job(loss=PAPER, optimizer=OPTIMIZER)
    update = world.trainer().train(job)
    model, _ = reference(world, job, torch.float64)
    error, moved = distance(update.folder / "model", model, world.student)
    assert moved > 1e-3
    assert error <= 1e-10


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_a_student_that_takes_no_packed_rows_is_trained_the_plain_way(
    family: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    float64_throughout: None,
) -> None:
    world = TrainingWorld(folders[family], tmp_path)
    job = world.job(loss=TOP_K_LOSS, weights="token", optimizer=CAPPED)
    num_tokens = 0

    def counted(*arguments: Any) -> PreTrainedModel:
        def count(module: torch.nn.Module, ids: tuple[Tensor]) -> None:
            nonlocal num_tokens
            num_tokens += ids[0].numel()

        model = load_model(*arguments)
        model.get_input_embeddings().register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(training_state, "load_model", counted)
    packed = world.trainer("packed").train(job)
    num_packed, num_tokens = num_tokens, 0
    assert "once for each response" not in caplog.text
    monkeypatch.setattr(PolicyModel, "try_packing", lambda *arguments: False)
    plain = world.trainer("plain").train(job)
    assert "once for each response" in caplog.text
    # The start-up check, of 3 prompts, is in the first of the two.
    assert num_packed < 0.6 * num_tokens
    found, expected = (load_file(update.folder / "model" / "model.safetensors") for update in (packed, plain))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-10, name
    assert packed.summary == pytest.approx(plain.summary, rel=1e-8)
    assert (packed.folder / "model" / "config.json").read_text() == (plain.folder / "model" / "config.json").read_text()


def test_a_round_equals_the_formulas_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    world = TrainingWorld(folders["qwen3_vl"], tmp_path)
    job = world.job(loss=RELEASE, optimizer=OPTIMIZER, dtype="float32")
    update = world.trainer().train(job)
    model, _ = reference(world, job, torch.float32)
    error, moved = distance(update.folder / "model", model, world.student)
    assert moved > 1e-3
    assert error <= 1e-5


def test_the_second_update_is_clipped_somewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without this the release's loss would be compared inside its clips alone."""
    world = TrainingWorld(folders["qwen3_vl"], tmp_path)
    job = world.job(loss=RELEASE, optimizer=OPTIMIZER)
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
        for path in (world.student, world.trainer().train(job).folder / "model")
    )
    ratios, advantages = [], []
    with torch.no_grad():
        for row in rows:
            old, new = (
                plain_logits(model, row.prompt.inputs, row.token_ids)
                .log_softmax(-1)
                .gather(-1, torch.tensor(row.token_ids)[:, None])[:, 0]
                for model in (before, after)
            )
            ratios += (new - old).exp().tolist()
            advantages += (torch.tensor(row.teacher_logprobs) - old).tolist()
    both = list(zip(ratios, advantages, strict=True))
    assert any(ratio > 1.2 and advantage > 0 for ratio, advantage in both)
    assert any(ratio < 0.8 and advantage < 0 for ratio, advantage in both)


def test_divergences_are_those_of_the_round_as_it_begins(folders: dict[str, Path], tmp_path: Path) -> None:
    world = TrainingWorld(folders["qwen3_vl"], tmp_path)
    job = other_engine(world, world.job(optimizer=CAPPED))
    summary = world.trainer().train(job).summary
    model = AutoModelForImageTextToText.from_pretrained(world.student, dtype=torch.float64)
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    k1, k3, entropy, difference, ratios = [], [], [], [], []
    with torch.no_grad():
        for row in rows:
            logprobs = plain_logits(model, row.prompt.inputs, row.token_ids).log_softmax(-1)
            entropy += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
            for token, teacher, sampler, distribution in zip(
                row.token_ids, row.teacher_logprobs, row.sampler_logprobs, logprobs.tolist(), strict=True
            ):
                gap = teacher - distribution[token]
                k1.append(-gap)
                k3.append(min(math.exp(gap) - gap - 1, 10))
                difference.append(abs(distribution[token] - sampler))
                ratios.append(math.exp(distribution[token]) / math.exp(sampler))
    tokens = [row for ref in job.rollouts for row in read_rows(world.store.read(ref, "rollouts.parquet"), Rollout)]
    assert len(k1) == sum(len(row.token_ids) for row in tokens)
    expected = {
        "divergence_k1": sum(k1) / len(k1),
        "divergence_k3": sum(k3) / len(k3),
        "entropy": sum(entropy) / len(entropy),
        "sampler_difference_mean": sum(difference) / len(difference),
        "sampler_difference_max": max(difference),
        "importance_ratio_mean": sum(ratios) / len(ratios),
        "importance_ratio_max": max(ratios),
        "importance_effective_share": sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios)),
        "importance_capped_share": sum(ratio > 1.25 for ratio in ratios) / len(ratios),
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    json.dumps(summary, allow_nan=False)
