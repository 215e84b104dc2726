"""The trainer as a resource: warm or cold, cut anyhow, failed and tried again, it makes the same policy."""

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support.plain import plain_logprobs
from support.training import K2, OPTIMIZER, TrainingWorld
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tasks.adapters import training_state
from tasks.adapters.accelerator import make_accelerator, require_trackers
from tasks.adapters.models import load_model, load_processor, weights_digest
from tasks.adapters.store import StoreError
from tasks.adapters.trainer import Trainer, Update
from tasks.adapters.training_data import CheckpointJob, TrainJob, read_training_rows
from tasks.adapters.training_state import TrainingState
from tasks.artifacts import ArtifactRef
from tasks.config import LoRAConfig, ModelConfig, OptimizerConfig, PlacementConfig, TrainerConfig
from tasks.serve import Engines
from tasks.stage import RunContext
from tasks.train import checkpoint, train
from vzero_core.config import preset
from vzero_core.errors import ConfigError, InputError

RELEASE = preset("release").loss


def weights(update: Update) -> dict[str, torch.Tensor]:
    return load_file(update.folder / "model" / "model.safetensors")


def initial(world: TrainingWorld) -> dict[str, torch.Tensor]:
    return load_file(world.student / "model.safetensors")


def changed(optimizer: OptimizerConfig = OPTIMIZER, **values: Any) -> OptimizerConfig:
    return optimizer.model_copy(update=values)


# --- one round ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "kind", "cap"),
    [(K2, "response", None), (RELEASE, "token", None), (K2, "response", 1.0), (RELEASE, "token", 1.0)],
    ids=["sequence mean", "token mean, token weights", "sequence mean, importance", "token mean, importance"],
)
def test_micro_batches_do_not_matter(loss: Any, kind: Any, cap: float | None, world: TrainingWorld) -> None:
    # One mini-batch: two of its prompts make one forward batch, or two where the budget is small.
    job = world.job(loss=loss, weights=kind, optimizer=changed(mini_batches=1, epochs=2, importance_cap=cap))
    whole = weights(world.trainer("whole").train(job))
    for budget in (1, 100):
        parts = weights(world.trainer(f"budget {budget}", max_batch_tokens=budget).train(job))
        for name, tensor in whole.items():
            assert (parts[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "idefics3"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all weights", "adapters"])
def test_activations_computed_again_give_the_same_update(
    lora: LoRAConfig | None,
    family: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = TrainingWorld(folders[family], tmp_path)
    job = world.job(loss=RELEASE, weights="token", optimizer=changed(lora=lora))
    num_calls = 0

    def counted(*arguments: Any) -> PreTrainedModel:
        def count(*_: Any) -> None:
            nonlocal num_calls
            num_calls += 1

        model = load_model(*arguments)
        # A layer's own hooks are outside of what is computed again.
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(count)
        return model

    monkeypatch.setattr(training_state, "load_model", counted)
    kept = world.trainer("kept").train(job)
    num_kept, num_calls = num_calls, 0
    again = world.trainer("again", placement=TrainerConfig(gradient_checkpointing=True)).train(job)
    # Forward batches: of the check two, of the old log-probs some, and of each update's some more, computed twice.
    assert num_kept < num_calls < 2 * num_kept
    assert again.policy == kept.policy
    assert again.summary == kept.summary


def test_frozen_parts_stay_bit_for_bit_and_the_rest_moves(world: TrainingWorld) -> None:
    patterns = ("model.visual.*", "*.layers.0.mlp.down_proj.weight")
    update = world.trainer().train(world.job(optimizer=changed(frozen=patterns), dtype="float32"))
    before, after = initial(world), weights(update)
    frozen = {name for name in before if name.startswith("model.visual.") or ".layers.0.mlp.down_proj." in name}
    assert 0 < len(frozen) < len(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in frozen), name
    moments = load_file(update.folder / "state" / "optimizer.safetensors")
    assert {name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")} == set(before) - frozen


@pytest.mark.parametrize(
    ("patterns", "message"), [(("visual.*",), r"'visual\.\*' fits none"), (("*",), "leave parameters to train")]
)
def test_frozen_patterns_must_fit_something_and_not_all(
    patterns: tuple[str, ...], message: str, world: TrainingWorld
) -> None:
    with pytest.raises(InputError, match=message):
        world.trainer().train(world.job(optimizer=changed(frozen=patterns)))


def test_the_learning_rate_warms_up_over_updates_and_rounds(
    world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run = Run(world)
    optimizer = changed(learning_rate=0.01, warmup_updates=3)
    first = run.train(world.job(optimizer=optimizer))
    run.restart("again")
    second = run.train(world.job(optimizer=optimizer, round=2, policy=first))
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert world.store.manifest(first).summary["learning_rate"] == pytest.approx(0.02 / 3)
    assert world.store.manifest(second).summary["num_updates"] == 4


def spoil_first_loss(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Make the first mini-batch's gradient not finite."""
    loss, calls = Trainer._loss, 0

    def spoiled(self: Trainer, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(self, *arguments) * (factor if calls == 1 else 1.0)

    monkeypatch.setattr(Trainer, "_loss", spoiled)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_an_update_without_a_finite_gradient_is_skipped_and_counted(
    factor: float, world: TrainingWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = world.job()
    spoil_first_loss(monkeypatch, factor)
    update = world.trainer().train(job)
    assert (update.summary["num_skipped_updates"], update.summary["num_updates"]) == (1, 1)
    assert "not finite" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in weights(update).values())
    # The one update that counts is the warm-up's first.
    assert update.summary["learning_rate"] == pytest.approx(OPTIMIZER.learning_rate / OPTIMIZER.warmup_updates)
    step = load_file(update.folder / "state" / "optimizer.safetensors")
    assert {float(value) for name, value in step.items() if name.endswith(".step")} == {1.0}


def test_a_round_of_skipped_updates_changes_nothing(world: TrainingWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_first_loss(monkeypatch, float("nan"))
    run = Run(world)
    ref = run.train(world.job(optimizer=changed(mini_batches=1), dtype="float32"))
    summary = world.store.manifest(ref).summary
    assert (summary["num_skipped_updates"], summary["num_updates"]) == (1, 0)
    assert summary["grad_norm"] is summary["loss"] is None
    after = load_file(trainer_of(run)._work_dir / f"policy-{ref.key}" / "model" / "model.safetensors")
    for name, tensor in initial(world).items():
        assert torch.equal(after[name], tensor), name
    run.restart("again")
    run.train(world.job(optimizer=changed(mini_batches=1), dtype="float32", round=2, policy=ref))


def test_small_updates_are_not_lost_in_bfloat16(world: TrainingWorld) -> None:
    """Of two bfloat16 numbers near 0.2, one is 0.001 above the other; an update of a real model is 1e-6."""
    small = changed(learning_rate=1e-6, warmup_updates=0, weight_decay=0.0)
    half, full = (
        world.trainer(dtype).train(world.job(optimizer=small, dtype=dtype)) for dtype in ("bfloat16", "float32")
    )
    before, after, expected = initial(world), weights(half), weights(full)
    agreeing = moved = 0
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        moved += int((after[name] != tensor).sum())
        agreeing += int(((after[name] - tensor).sign() == (expected[name] - tensor).sign()).sum())
    count = sum(tensor.numel() for tensor in before.values())
    assert moved > 0.8 * count
    assert agreeing > 0.8 * count
    assert 0 < abs(half.summary["divergence_k1"] - full.summary["divergence_k1"]) < 0.05


def test_a_rounds_figures_are_sent_to_tensorboard(world: TrainingWorld, tmp_path: Path) -> None:
    accelerator = make_accelerator(cpu=True, trackers=("tensorboard",), run_name="here", folder=tmp_path / "trackers")
    trainer = world.trainer()
    trainer._accelerator = accelerator
    updates = []
    policy = None
    for number in (1, 2):
        job = world.job(round=number, policy=policy)
        updates.append(trainer.train(job))
        policy = ArtifactRef(stage="train", key=job.key, digest="any")
    trainer.release()
    events = EventAccumulator(str(tmp_path / "trackers" / "here"))
    events.Reload()
    for name in ("loss", "grad_norm", "divergence_k1", "entropy"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(number, pytest.approx(update.summary[name])) for number, update in enumerate(updates, 1)]


def test_a_tracker_that_is_not_installed_is_named() -> None:
    require_trackers(("tensorboard",))
    with pytest.raises(ConfigError, match=r"tracking\.trackers must be installed, got wandb, aim; install"):
        require_trackers(("wandb", "tensorboard", "aim"))


# --- another engine samples ---------------------------------------------------------------------------------------


def own_logprobs(world: TrainingWorld, job: TrainJob) -> list[torch.Tensor]:
    """Log-probs of a job's responses under the student as it begins, one tensor each."""
    model = AutoModelForImageTextToText.from_pretrained(world.student, dtype=torch.float64)
    rows = read_training_rows(job, world.store, world.dataset, world.processor)
    with torch.no_grad():
        return [plain_logprobs(model, row.prompt.inputs, row.token_ids) for row in rows]


@pytest.mark.parametrize(
    ("ratio", "cap", "factor", "capped"),
    [(2.0, None, 1.0, None), (2.0, 4.0, 2.0, 0.0), (2.0, 1.5, 1.5, 1.0), (0.25, 1.0, 0.25, 0.0)],
)
@pytest.mark.parametrize(("loss", "kind"), [(K2, "response"), (RELEASE, "token")], ids=["k2", "release"])
def test_a_common_ratio_scales_loss_and_gradient_up_to_the_cap(
    loss: Any,
    kind: Any,
    ratio: float,
    cap: float | None,
    factor: float,
    capped: float | None,
    world: TrainingWorld,
) -> None:
    job = world.job(loss=loss, weights=kind, optimizer=changed(mini_batches=1, importance_cap=cap))
    plain = world.trainer("plain").train(world.job(loss=loss, weights=kind, optimizer=changed(mini_batches=1)))
    shifted = [logprobs - math.log(ratio) for logprobs in own_logprobs(world, job)]
    weighted = world.trainer("weighted").train(world.with_sampler_logprobs(job, shifted))
    for name in ("loss", "grad_norm"):
        assert weighted.summary[name] == pytest.approx(factor * plain.summary[name], rel=1e-5), name
    figures = {name: value for name, value in weighted.summary.items() if name.startswith("importance_")}
    assert figures == {
        "importance_ratio_mean": pytest.approx(ratio, rel=1e-5),
        "importance_ratio_max": pytest.approx(ratio, rel=1e-5),
        "importance_effective_share": pytest.approx(1.0),
        "importance_capped_share": capped,
    }


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_samplers_log_probs_change_weights_with_a_cap_alone(cap: float | None, world: TrainingWorld) -> None:
    job = world.job(optimizer=changed(importance_cap=cap), dtype="float32")
    other = world.with_sampler_logprobs(job, [0.1 - values.abs() / 2 for values in own_logprobs(world, job)])
    left, right = world.trainer("left").train(job), world.trainer("right").train(other)
    assert left.summary["importance_ratio_mean"] != right.summary["importance_ratio_mean"]
    assert (left.policy == right.policy) == (cap is None)


def test_a_sampler_log_prob_that_is_not_finite_is_named(world: TrainingWorld) -> None:
    job = world.job()
    logprobs = own_logprobs(world, job)
    logprobs[2][0] = -math.inf
    with pytest.raises(InputError, match="sampler_logprobs must be finite"):
        world.trainer().train(world.with_sampler_logprobs(job, logprobs))


@pytest.mark.parametrize("cap", [0.9, math.inf])
def test_a_cap_must_be_finite_and_let_equal_engines_pass(cap: float) -> None:
    with pytest.raises(ValidationError, match="importance_cap"):
        OptimizerConfig(importance_cap=cap)


def test_another_target_is_another_teacher(world: TrainingWorld) -> None:
    """The stored replays have no view without a crop, so asking for it must not fall back on another."""
    with pytest.raises(AssertionError, match="target view"):
        world.trainer().train(world.job().model_copy(update={"target": "none"}))


# --- the same policy, however it is reached -----------------------------------------------------------------------


class Silent:
    """A terminal that shows nothing."""

    def track(self, title: str, total: int) -> Any:
        raise AssertionError("training shows no bar")


class Run:
    """The stages of training on a world's store, restarted at will."""

    def __init__(self, world: TrainingWorld, *, checkpoint_every: int = 1) -> None:
        self.world = world
        self.checkpoint_every = checkpoint_every
        self.restart("first")

    def restart(self, name: str) -> None:
        """Go on in another process on another machine: nothing is held, nothing lies on the local disk."""
        model = ModelConfig(path=str(self.world.student))
        work_dir = self.world.root / name
        placement = PlacementConfig(threads=1, work_dir=str(work_dir))
        self.engines = Engines(
            self.world.store,
            self.world.dataset,
            student=model,
            teacher=model,
            placement=placement,
            training=self.world.settings(work_dir),
            work_dir=work_dir,
            track=Silent().track,
        )
        unused = cast(Any, None)
        self.context = RunContext(
            store=self.world.store,
            data=unused,
            data_version="v",
            compared={},
            dataset=self.world.dataset,
            benchmarks={},
            judge=unused,
            engines=self.engines,
            terminal=Silent(),
            image_threads=1,
            checkpoint_every=self.checkpoint_every,
        )

    def train(self, job: TrainJob) -> ArtifactRef:
        return train.fn(job, self.context)

    def rounds(self, last: int, *, first: int = 1, policy: ArtifactRef | None = None, **values: Any) -> ArtifactRef:
        for number in range(first, last + 1):
            policy = self.train(self.world.job(round=number, policy=policy, loss=RELEASE, **values))
        assert policy is not None
        return policy

    def checkpoint_of(self, policy: ArtifactRef) -> ArtifactRef:
        found = self.world.store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
        assert found is not None
        return found.ref


def trainer_of(run: Run) -> Trainer:
    trainer = run.engines.trainer
    assert isinstance(trainer, Trainer)
    return trainer


@pytest.fixture
def make_run(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Run]:
    """A run on a store of its own; equal jobs have equal keys in all of them."""

    def make(name: str, **values: Any) -> Run:
        return Run(TrainingWorld(folders["qwen3_vl"], tmp_path / name), **values)

    return make


@pytest.fixture(scope="module")
def undisturbed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """Three rounds in one go."""
    return Run(TrainingWorld(folders["qwen3_vl"], tmp_path_factory.mktemp("undisturbed"))).rounds(3)


def test_a_restart_goes_on_from_the_stored_state(make_run: Callable[..., Run], undisturbed: ArtifactRef) -> None:
    run = make_run("restarted")
    second = run.rounds(2)
    run.restart("second machine")
    assert run.rounds(3, first=3, policy=second) == undisturbed


def test_with_adapters_a_restart_goes_on_from_the_stored_state(make_run: Callable[..., Run]) -> None:
    optimizer = changed(lora=LoRAConfig(rank=2))
    undisturbed = make_run("whole").rounds(3, optimizer=optimizer)
    run = make_run("restarted")
    first = run.rounds(1, optimizer=optimizer)
    run.restart("second machine")
    second = run.rounds(2, first=2, policy=first, optimizer=optimizer)
    run.world.store.prune(run.checkpoint_of(second))
    run.restart("third machine")
    assert run.rounds(3, first=3, policy=second, optimizer=optimizer) == undisturbed


@pytest.mark.parametrize("lost", [(2,), (1, 2)])
def test_without_a_state_rounds_are_repeated_from_stored_responses(
    lost: tuple[int, ...],
    make_run: Callable[..., Run],
    undisturbed: ArtifactRef,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = make_run("pruned")
    policies = [run.rounds(1)]
    policies.append(run.rounds(2, first=2, policy=policies[0]))
    for number in lost:
        run.world.store.prune(run.checkpoint_of(policies[number - 1]))
    run.restart("second machine")
    assert run.rounds(3, first=3, policy=policies[1]) == undisturbed
    assert [record.args for record in caplog.records if "repeating round" in record.msg] == [(n,) for n in lost]
    assert "differ from the recorded" not in caplog.text


def test_rare_checkpoints_give_the_same_policies(make_run: Callable[..., Run], undisturbed: ArtifactRef) -> None:
    run = make_run("rare", checkpoint_every=2)
    first = run.rounds(1)
    assert run.world.store.find(CheckpointJob.stage, CheckpointJob(train_key=first.key).key) is None
    run.restart("second machine")
    second = run.rounds(2, first=2, policy=first)
    run.restart("third machine")
    third = run.rounds(3, first=3, policy=second)
    assert third == undisturbed
    # The last round's state is stored on demand: from memory, or by training once more.
    run.restart("fourth machine")
    selected = checkpoint.fn(CheckpointJob(train_key=third.key), run.context)
    policy = json.loads(run.world.store.read(third, "policy.json"))
    assert json.loads(run.world.store.read(selected, "policy.json")) == policy
    assert json.loads(run.world.store.read(selected, "state/progress.json")) == {"num_updates": 6}


def test_a_policy_that_is_repeated_otherwise_is_reported(
    make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device whose sums are in no fixed order."""
    run = make_run("drifting", checkpoint_every=10)
    first = run.rounds(1)
    run.restart("second machine")
    spoil_first_loss(monkeypatch, 1 + 1e-3)
    run.rounds(2, first=2, policy=first)
    assert "differ from the recorded" in caplog.text


@pytest.mark.parametrize("failing", [1, 2], ids=["first round", "second round"])
def test_a_failure_between_two_updates_leaves_no_trace(
    failing: int, make_run: Callable[..., Run], undisturbed: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("failing")
    policy = run.rounds(1) if failing == 2 else None
    update, calls = Trainer._update, 0

    def break_down(self: Trainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ConnectionError("the machine is gone")
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", break_down)
    with pytest.raises(ConnectionError):
        run.rounds(failing, first=failing, policy=policy)
    assert run.rounds(3, first=failing, policy=policy) == undisturbed
    assert calls > 2


def test_a_failure_after_the_last_update_leaves_no_trace(
    make_run: Callable[..., Run], undisturbed: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the weights are written, and half of them lie there at the next try."""
    run = make_run("full disk")
    save = TrainingState.save

    def fill(self: TrainingState, folder: Path) -> None:
        save(self, folder)
        (folder / "model" / "model.safetensors").write_bytes(b"half")
        (folder.with_name(f"{folder.name}.partial") / "model").mkdir(parents=True)
        monkeypatch.setattr(TrainingState, "save", save)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainingState, "save", fill)
    with pytest.raises(OSError, match="No space"):
        run.rounds(1)
    first = run.rounds(1)
    run.restart("second machine")
    assert run.rounds(3, first=2, policy=first) == undisturbed


def test_a_round_that_is_stored_is_not_trained_again(make_run: Callable[..., Run], undisturbed: ArtifactRef) -> None:
    run = make_run("killed")
    second = run.rounds(2)
    job = run.world.job(round=3, policy=second, loss=RELEASE)
    run.train(job)
    # Killed after the state was stored, before the round was.
    shutil.rmtree(run.world.root / "store" / "train" / job.key)
    run.restart("second machine")
    run.engines.trainer.train = cast(Any, None)
    assert run.train(job) == undisturbed


def test_the_last_job_costs_nothing_again(world: TrainingWorld) -> None:
    trainer = world.trainer()
    update = trainer.train(world.job())
    assert trainer.train(world.job()) is update


def test_what_was_let_go_is_loaded_again(make_run: Callable[..., Run], undisturbed: ArtifactRef) -> None:
    run = make_run("released")
    policy = run.rounds(1)
    held = weakref.ref(trainer_of(run)._state)
    with run.engines:
        pass
    gc.collect()
    assert held() is None
    assert run.rounds(3, first=2, policy=policy) == undisturbed


def test_going_back_to_another_policy_reloads(make_run: Callable[..., Run], undisturbed: ArtifactRef) -> None:
    """Two runs that share a trainer, as an ablation beside its baseline."""
    run = make_run("both")
    first = run.rounds(1)
    other = run.train(run.world.job(round=1, loss=K2))
    assert other != first
    assert run.rounds(3, first=2, policy=first) == undisturbed


@pytest.mark.parametrize(
    "changes",
    [{"frozen": ("model.visual.*",)}, {"weight_decay": 0.5}, {"betas": (0.5, 0.6)}, {"learning_rate": 0.1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_round_with_other_settings_is_the_same_warm_and_cold(
    changes: dict[str, Any], make_run: Callable[..., Run]
) -> None:
    optimizer = changed(**changes)
    warm, cold = make_run("warm"), make_run("cold")
    first = warm.rounds(1)
    assert cold.rounds(1) == first
    cold.restart("second machine")
    left, right, usual = (
        run.rounds(2, first=2, policy=first, optimizer=settings)
        for run, settings in ((warm, optimizer), (cold, optimizer), (cold, OPTIMIZER))
    )
    assert left == right
    assert left.digest != usual.digest


def test_the_local_disk_holds_the_last_two_policies(make_run: Callable[..., Run]) -> None:
    run = make_run("tidy")
    run.rounds(3)
    work_dir = run.world.root / "first"
    assert len(list(work_dir.glob("policy-*"))) == 2
    run.restart("first")
    last = run.rounds(4)
    names = {path.name for path in work_dir.iterdir()}
    assert f"policy-{last.key}" in names
    assert len(names) == 2


def test_a_missing_policy_is_named(world: TrainingWorld) -> None:
    gone = ArtifactRef(stage="train", key="0" * 32, digest="1" * 32)
    with pytest.raises(StoreError, match="train/" + "0" * 32):
        world.trainer().train(world.job(round=2, policy=gone))


# --- what is stored -----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_model_folder_without_anything_pickled(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = shutil.copytree(folders["qwen3_vl"], tmp_path / "student")
    for junk in ("pytorch_model.bin", "training_args.pt", "modeling_own.py", "README.md", ".hidden", "original/a.pth"):
        (student / junk).parent.mkdir(exist_ok=True)
        (student / junk).write_bytes(b"junk")
    (student / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    shutil.move(student / "model.safetensors", tmp_path / "weights")
    shutil.copy(tmp_path / "weights", student / "model.safetensors")
    run = Run(TrainingWorld(student, tmp_path / "world"))
    ref = run.checkpoint_of(run.rounds(1))
    manifest = run.world.store.manifest(ref)
    names = {entry.path for entry in manifest.files}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".jinja"}
    assert not any("index" in name or "original" in name for name in names)
    assert {"policy.json", "summary.json", "state/optimizer.safetensors", "state/progress.json"} < names
    for name in names - {name for name in names if name.endswith(".safetensors")}:
        assert str(tmp_path) not in run.world.store.read(ref, name).decode()

    run.world.store.fetch(ref, "model", tmp_path / "opened")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "opened", dtype=torch.float64)
    policy = json.loads(run.world.store.read(ref, "policy.json"))
    assert policy == {"weights": weights_digest(model.state_dict()), "num_updates": 2}
    assert load_processor(tmp_path / "opened").tokenizer.get_vocab() == run.world.processor.tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == [2, 0]


def test_summaries_follow_from_the_job_alone(make_run: Callable[..., Run]) -> None:
    left, right = make_run("left"), make_run("right")
    first = right.rounds(1)
    right.restart("second machine")
    summaries = [
        run.world.store.manifest(ref).summary
        for run, ref in ((left, left.rounds(2)), (right, right.rounds(2, first=2, policy=first)))
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0]["num_updates"] == 4
