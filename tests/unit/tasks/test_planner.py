"""The plan's arithmetic against what torch counts and allocates on small models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.adapters.forward import logits_of, prefill, response_hidden
from tasks.adapters.hardware import ask_hardware
from tasks.adapters.model_shape import Part, read_shape
from tasks.adapters.models import load_model
from tasks.adapters.output_layer import score_logits, score_tokens
from tasks.adapters.packed import enable_packing, packed_hidden
from tasks.adapters.plan_memory import GIB, engine_memory, num_batched, server_room, trainer_memory
from tasks.adapters.planner import Hardware, make_plan, require_fit
from tasks.adapters.prompts import ModelInputs, PromptProcessor
from tasks.adapters.tables import write_rows
from tasks.adapters.workload import Setup, round_traffic, round_work, training_batch, what_learns
from tasks.artifacts import Replay, Rollout
from tasks.config import (
    HardwareConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PlacementConfig,
    PromptConfig,
    ServersConfig,
    TrainerConfig,
    VLLMEngine,
)
from tests.support.tiny_models import picture, save_tiny_model
from vzero_core.errors import ConfigError, InputError

P, G, T = 512, 8, 32
HIDDEN, MLP, LAYERS, VOCABULARY = 256, 768, 4, 4096


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_tiny_model(family, tmp_path_factory.mktemp(family))
        for family in ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "idefics3")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL whose activations outweigh its weights."""
    folder = tmp_path_factory.mktemp("small")
    _small_config().save_pretrained(folder)
    return folder


def _small_config() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        image_token_id=8,
        video_token_id=9,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )


def _setup(folder: Path, **changes: Any) -> Setup:
    model = ModelConfig(path=str(folder))
    shape = read_shape(str(folder))
    values: dict[str, Any] = {
        "student": model,
        "teacher": model,
        "student_shape": shape,
        "teacher_shape": shape,
        "optimizer": OptimizerConfig(),
        "placement": PlacementConfig(max_batch_tokens=P + G * T),
        "num_prompts": 1,
        "num_responses": G,
        "max_new_tokens": T,
        "num_shards": 1,
        "checkpoint_every": 1,
        "views": ("positive", "negative"),
        "top_k": 10,
        "max_prompt_tokens": None,
        "prompt_tokens": P,
        "crop_tokens": 256,
        "response_tokens": T,
        "image_bytes": None,
    }
    return Setup(**{**values, **changes})


# --- parameters and operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "idefics3"])
def test_parameters_are_those_of_the_loaded_model(folders: dict[str, Path], family: str) -> None:
    model, shape = load_model(folders[family], "float32", "cpu"), read_shape(str(folders[family]))
    assert shape.num_parameters == sum(part.numel() for part in model.parameters())
    sizes = {name: part.numel() for name, part in model.named_parameters()}
    assert {part.name: part.size for part in shape.parameters} == sizes
    output = model.get_output_embeddings().weight
    assert shape.output == output.numel()
    assert shape.tied == (output is model.get_input_embeddings().weight)
    decoder = sum(part.numel() for part in model.get_decoder().parameters())
    assert shape.language.num_parameters + shape.embedding == decoder


def test_a_folder_needs_its_configuration_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["qwen3_5"] / "config.json").read_bytes())
    assert read_shape(str(tmp_path)) == read_shape(str(folders["qwen3_5"]))


def test_a_folder_without_a_usable_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have a config\.json; it has none"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="must describe an image-text-to-text model"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "error"),
    [
        ("fuyu", "AttributeError: .*num_key_value_heads"),
        ("cohere_compass", "KeyError"),
        ("granite4_vision", "TypeError"),
        ("pp_formulanet", "NotImplementedError"),
    ],
)
def test_a_family_of_an_unusual_build_is_refused_in_words(tmp_path: Path, family: str, error: str) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"whose sizes can be read, but its config.json gives {error}"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "merge", "patch", "hidden", "packed"),
    [
        ("qwen2_vl", 4, 3 * 2 * 14 * 14, 1280, True),
        # Half of each side's patches.
        ("internvl", 4, 3 * 14 * 14, 1024, True),
        # 64 x 64 patches for 256 tokens; attention in windows.
        ("gemma3", 16, 3 * 14 * 14, 768, False),
        ("llava", 1, 3 * 14 * 14, 1024, True),
        ("idefics3", 4, 3 * 32 * 32, 1152, True),
    ],
)
def test_other_families_say_their_sizes_otherwise(
    tmp_path: Path, family: str, merge: int, patch: int, hidden: int, packed: bool
) -> None:
    config = AutoConfig.for_model(family)
    if family == "gemma3":
        config.vision_config.image_size, config.vision_config.patch_size = 896, 14
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert (shape.vision.merge, shape.vision.patch, shape.vision.hidden) == (merge, patch, hidden)
    assert shape.packed == packed


def test_a_token_passes_some_of_the_experts(tmp_path: Path) -> None:
    config = Qwen3VLMoeConfig()
    text = config.text_config
    text.num_hidden_layers, text.hidden_size, text.moe_intermediate_size = 2, 256, 64
    text.num_experts, text.num_experts_per_tok = 8, 2
    text.intermediate_size = 512
    config.save_pretrained(tmp_path)
    part = read_shape(str(tmp_path)).language
    # Three matrices of 256 x 64 an expert, of which 6 of 8 are idle in each layer.
    assert part.num_parameters - part.num_active == 2 * 6 * 3 * 256 * 64
    assert part.mlp == 2 * (64 + 256)


# The delta rule fills its last chunk of 64 tokens, of which a tiny prompt has 46 and a response 11: torch counts those
# too, and the gradients of its many small products.
@pytest.mark.parametrize(
    ("family", "forward_low", "backward_low"), [("qwen3_vl", 0.9, 0.9), ("qwen2_5_vl", 0.9, 0.9), ("qwen3_5", 0.7, 0.5)]
)
def test_operations_are_those_that_torch_counts(
    folders: dict[str, Path], family: str, forward_low: float, backward_low: float
) -> None:
    model, shape = load_model(folders[family], "float32", "cpu"), read_shape(str(folders[family]))
    processor = PromptProcessor(folders[family])
    prompt = processor.encode(processor.prompt("w1 w2 w3", [picture(32, 32, 0)], PromptConfig()))
    length, visual = prompt["input_ids"].shape[1], int(prompt["mm_token_type_ids"].sum())
    responses = torch.randint(8, 20, (4, 12), generator=torch.Generator().manual_seed(0))
    enable_packing(model)
    # torch does not count its fused attention on CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            hidden = packed_hidden(model, [prompt], responses).flatten(0, 1)
            weight = model.get_output_embeddings().weight
            loss = score_tokens(hidden, weight, responses.flatten()).logprobs.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    # A response's last token is not read.
    num_read = 4 * 11
    layers = shape.vision_flops(visual)
    layers += shape.language_flops(length + num_read, length**2 + num_read * (length + 11))
    output = shape.output_flops(4 * 12)
    assert forward_low < (layers + output) / forward.get_total_flops() < 1.1
    # The output layer's addition in place of its weights' gradient is not counted by torch, and there is a third more.
    assert backward_low < (2 * layers + 2 * output) / backward.get_total_flops() < 1.1


def test_a_rounds_training_is_the_sum_of_its_passes(small: Path) -> None:
    setup = _setup(small, num_prompts=4)
    shape = setup.student_shape
    once = shape.vision_flops(P) + shape.language_flops(P + G * T, P * P + G * T * (P + T))
    output = shape.output_flops(G * T)
    training = round_work(setup)[2]
    # Old log-probs, forward, two parts backward; the output layer computes its logits again.
    assert training.flops == pytest.approx(4 * (4 * once + 5 * output))
    assert training.num_computed == 4 * 2 * (P + G * T)
    again = replace(setup, placement=_trainer(setup, gradient_checkpointing=True))
    assert round_work(again)[2].flops == pytest.approx(4 * (5 * once + 5 * output))
    fixed = replace(setup, optimizer=OptimizerConfig(frozen=("model.visual.*",)))
    assert round_work(fixed)[2].flops == pytest.approx(training.flops - 4 * 2 * shape.vision_flops(P))


def _trainer(setup: Setup, **changes: Any) -> PlacementConfig:
    return setup.placement.model_copy(update={"trainer": TrainerConfig(**changes)})


def test_replay_on_servers_pays_the_prompt_for_every_response(small: Path) -> None:
    boxed = _setup(small, num_prompts=2)
    served = replace(boxed, teacher=_on_servers(boxed.teacher))
    cached = replace(
        served,
        placement=served.placement.model_copy(update={"teacher_servers": ServersConfig(read_prefix_cache=True)}),
    )
    assert round_work(boxed)[1].num_computed == 2 * (P + 2 * (256 + G * T))
    assert round_work(served)[1].num_computed == 2 * 2 * G * (P + 256 + T)
    assert round_work(cached)[1].num_computed == 2 * 2 * (P + 256 + G * T)


def _on_servers(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"engine": VLLMEngine(version="0.32.0")})


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(P + G * T, (1, 8, 1)), (2 * (P + G * T), (2, 8, 1)), (P + 3 * T, (1, 3, 3)), (10, (1, 1, 8))],
)
def test_a_group_too_large_for_the_budget_is_cut(small: Path, budget: int, expected: tuple[int, int, int]) -> None:
    setup = _setup(small, num_prompts=4, placement=PlacementConfig(max_batch_tokens=budget))
    batch = training_batch(P, T, setup)
    assert (batch.num_prompts, batch.num_responses, batch.num_parts) == expected


def test_without_packed_rows_every_response_has_its_prompt(small: Path) -> None:
    setup = _setup(small, num_prompts=4, placement=PlacementConfig(max_batch_tokens=3 * (P + T)))
    setup = replace(setup, student_shape=replace(setup.student_shape, packed=False))
    batch = training_batch(P, T, setup)
    assert (batch.num_prompts, batch.num_responses, batch.num_parts) == (3, 1, G)
    assert round_work(setup)[2].num_computed == 4 * 2 * G * (P + T)


def test_adapters_are_counted_by_their_rank(small: Path) -> None:
    shape = read_shape(str(small))
    attention = what_learns(shape, OptimizerConfig(lora=LoRAConfig(rank=4, target=r".*self_attn\.[qv]_proj")))
    # q: 256 to 8 heads of 32; v: 256 to 4 heads of 32.
    assert attention.num_parameters == LAYERS * 4 * ((256 + 256) + (256 + 128))
    assert not attention.passes_vision
    everywhere = what_learns(shape, OptimizerConfig(lora=LoRAConfig(rank=4)))
    assert everywhere.passes_vision
    spared = what_learns(shape, OptimizerConfig(lora=LoRAConfig(rank=4), frozen=("model.visual.*",)))
    assert not spared.passes_vision
    assert attention.num_parameters < spared.num_parameters < everywhere.num_parameters


# --- memory -------------------------------------------------------------------------------------------------------


def _peak(compute: Callable[[], object]) -> int:
    """Give the most bytes of tensors that were allocated at once beyond those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        compute()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def _inputs() -> ModelInputs:
    height, width = 32, 15
    ids = torch.tensor([[6, *[8] * (height * width), 7, *[20] * (P - height * width - 2)]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 8).int(),
        "pixel_values": torch.randn(4 * height * width, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]]),
    }


@pytest.mark.parametrize(("dtype", "again"), [("float32", False), ("bfloat16", True)])
def test_memory_of_a_training_step_is_what_torch_allocates(small: Path, dtype: str, again: bool) -> None:
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(_small_config()).eval()
    if again:
        model.activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    enable_packing(model)
    prompt, responses = _inputs(), torch.randint(20, 4000, (G, T))
    topk_ids = torch.arange(10).repeat(G * T, 1)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = packed_hidden(model, [prompt], responses).flatten(0, 1)
            scores = score_tokens(hidden, model.get_output_embeddings().weight, responses.flatten(), topk_ids)
        (scores.logprobs.sum() + scores.rest.sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    # Weights, moments and gradients are there now.
    measured = _peak(step)
    setup = _setup(small, student=ModelConfig(path=str(small), dtype=dtype))  # type: ignore[arg-type]
    setup = replace(setup, placement=_trainer(setup, gradient_checkpointing=again))
    use = trainer_memory(setup, on_gpu=False)
    assert 1.0 < dict(use.working)["forward and backward"] / measured < 1.3
    held = sum(part.numel() for part in model.parameters()) * 4
    moments = sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")
    assert dict(use.held) == {"weights": held, "moments": moments}
    assert dict(use.working)["gradients"] == sum(
        part.grad.nbytes for part in model.parameters() if part.grad is not None
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_logits_without_chunks_is_what_torch_allocates(small: Path, dtype: str) -> None:
    hidden, weight = torch.randn(256, 16, requires_grad=True), torch.randn(VOCABULARY, 16, requires_grad=True)
    responses, topk_ids = torch.randint(20, 4000, (256,)), torch.arange(10).repeat(256, 1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = (hidden @ weight.T)[torch.ones(256, dtype=torch.bool)]
            scores = score_logits(logits, responses, topk_ids)
        (scores.logprobs.sum() + scores.rest.sum()).backward()  # type: ignore[no-untyped-call]

    setup = _setup(small, num_responses=1, student=ModelConfig(path=str(small), dtype=dtype))  # type: ignore[arg-type]
    setup = replace(setup, max_new_tokens=256, placement=PlacementConfig(max_batch_tokens=P + 256))
    passing = [
        dict(trainer_memory(replace(setup, student_shape=shape), on_gpu=False).working)["forward and backward"]
        for shape in (replace(setup.student_shape, vocabulary=size, packed=False) for size in (VOCABULARY, 0))
    ]
    assert 1.0 <= (passing[0] - passing[1]) / _peak(step) < 1.3


def test_memory_of_a_replay_is_what_torch_allocates(small: Path) -> None:
    model = Qwen3VLForConditionalGeneration(_small_config()).eval()
    prompt, responses = _inputs(), torch.randint(20, 4000, (G, T))

    @torch.inference_mode()
    def replay() -> None:
        hidden = response_hidden(model, prefill(model, [prompt], G), responses)
        logits_of(model, hidden).float().log_softmax(-1).topk(10)

    setup = _setup(small, crop_tokens=0, placement=PlacementConfig(max_batch_tokens=G * (P + T)))
    use = engine_memory("teacher", setup.teacher, setup.teacher_shape, setup)
    assert 1.0 < dict(use.working)["cache and forward"] / _peak(replay) < 1.3
    assert dict(use.held) == {"weights": 4 * setup.teacher_shape.num_parameters}


def test_new_weights_are_read_into_main_memory_beside_the_old(small: Path) -> None:
    setup = _setup(small, prompt_tokens=1, crop_tokens=0, max_new_tokens=1, num_responses=1)
    setup = replace(setup, placement=PlacementConfig(max_batch_tokens=1))
    shape = setup.student_shape
    working = {
        (role, device): dict(
            engine_memory(
                role,
                setup.student,
                shape,
                replace(setup, placement=PlacementConfig(student_device=device, max_batch_tokens=1)),
            ).working
        )["cache and forward"]
        for role, device in (("student", "cpu"), ("student", "cuda:0"), ("teacher", "cpu"))
    }
    weights = 4 * shape.num_parameters
    assert working["student", "cpu"] == 2 * weights
    assert max(working["student", "cuda:0"], working["teacher", "cpu"]) < weights


def test_sharing_divides_what_is_held(small: Path) -> None:
    setup = _setup(small)
    alone = trainer_memory(setup, on_gpu=True)
    ddp = trainer_memory(replace(setup, placement=_trainer(setup, num_processes=4)), on_gpu=True)
    fsdp = trainer_memory(replace(setup, placement=_trainer(setup, num_processes=4, sharding="fsdp2")), on_gpu=True)
    assert dict(ddp.held) == dict(alone.held)
    assert dict(ddp.working)["gradients"] == 2 * dict(alone.working)["gradients"]
    assert dict(fsdp.held) == {name: size / 4 for name, size in alone.held}
    # Whole are the embedding, two layers and a gradient, these three with a buffer each.
    shape = setup.student_shape
    whole = 4 * (shape.embedding + 6 * shape.language.num_parameters / LAYERS)
    passing = [dict(use.working)["forward and backward"] for use in (alone, fsdp)]
    assert passing[1] - passing[0] == pytest.approx(whole)
    adapters = trainer_memory(replace(setup, optimizer=OptimizerConfig(lora=LoRAConfig(rank=2))), on_gpu=True)
    number = what_learns(setup.student_shape, OptimizerConfig(lora=LoRAConfig(rank=2))).num_parameters
    assert dict(adapters.held) == {"weights": 4 * (setup.student_shape.num_parameters + number), "moments": 8 * number}
    assert dict(adapters.working)["gradients"] == 4 * number


def test_cache_is_what_the_model_keeps(folders: dict[str, Path]) -> None:
    for family in ("qwen3_vl", "qwen3_5"):
        model, shape = load_model(folders[family], "float32", "cpu"), read_shape(str(folders[family]))
        processor = PromptProcessor(folders[family])
        prompt = processor.encode(processor.prompt("w1", [picture(32, 32, 0)], PromptConfig()))
        with torch.inference_mode():
            cache = prefill(model, [prompt], 2).cache
        tensors = {
            id(value): value
            for layer in cache.layers
            for entry in vars(layer).values()
            for value in (entry.values() if isinstance(entry, dict) else [entry])
            if isinstance(value, torch.Tensor) and value.numel()
        }
        expected = shape.cache_bytes(2 * prompt["input_ids"].shape[1], 2, 4)
        assert sum(value.nbytes for value in tensors.values()) == expected


# --- what cannot fit ----------------------------------------------------------------------------------------------


def _hardware(gib: float) -> Hardware:
    return Hardware({"cpu": 64 * GIB, "cuda": gib * GIB}, {"cpu": 1e9, "cuda": 1e12}, {"cpu": 1e9, "cuda": 1e11}, 1e9)


def _on_gpus(folder: Path, **trainer: Any) -> Setup:
    setup = _setup(folder)
    model = _on_servers(setup.student)
    devices = [str(number) for number in range(trainer.get("num_processes", 1))]
    return replace(
        setup,
        student=model,
        teacher=model,
        placement=PlacementConfig(
            student_device="cuda:0",
            max_batch_tokens=64 * (P + G * T),
            trainer=TrainerConfig(devices=tuple(devices) if devices[1:] else (), **trainer),
            student_servers=ServersConfig(devices=("6",), max_model_len=4096),
            teacher_servers=ServersConfig(devices=("7",), max_model_len=4096),
            hardware=HardwareConfig(memory_gib=1.0),
        ),
        num_prompts=64,
    )


def test_a_trainer_that_does_not_fit_is_told_what_helps(small: Path) -> None:
    plan = make_plan(_on_gpus(small), _hardware(12))
    trainer = next(device for device in plan.devices if device.devices == ("cuda:0",))
    with pytest.raises(ConfigError) as refused:
        require_fit(plan)
    needed = trainer.needed / GIB
    assert str(refused.value) == (
        f"the trainer needs {needed:.1f} GiB on cuda:0, which has 12.0 (placement.hardware.memory_gib); set "
        "placement.trainer.gradient_checkpointing = true, or placement.max_batch_tokens = 24576"
    )
    # Each of the two does what it says, and twice the tokens would not.
    for changes, fits in (
        ({"trainer": TrainerConfig(gradient_checkpointing=True)}, True),
        ({"max_batch_tokens": 24_576}, True),
        ({"max_batch_tokens": 49_152}, False),
    ):
        placement = plan.setup.placement.model_copy(update=changes)
        assert (not make_plan(replace(plan.setup, placement=placement), _hardware(12)).problems) == fits


def test_weights_too_large_for_one_device_are_to_be_shared(small: Path) -> None:
    setup = _on_gpus(small, num_processes=2)
    # 16 bytes a parameter, and 4 more while gradients are exchanged: 37 GiB, or 15 for half of them.
    parts = (Part("model.language_model.weight", 2 * 10**9, "language"), Part("model.visual.weight", 1, "vision"))
    large = replace(setup.student_shape, num_parameters=2 * 10**9, parameters=parts)
    setup = replace(setup, student_shape=large, placement=_less(setup, P + G * T))
    (problem,) = (text for text in make_plan(setup, _hardware(24)).problems if "trainer" in text)
    assert "on each of 2 devices, which have 24.0" in problem
    assert 'set placement.trainer.sharding = "fsdp2"' in problem


def _less(setup: Setup, tokens: int) -> PlacementConfig:
    return setup.placement.model_copy(update={"max_batch_tokens": tokens})


def test_a_cache_that_holds_no_request_is_refused(small: Path) -> None:
    setup = replace(_on_gpus(small), max_prompt_tokens=P)
    servers = ServersConfig(devices=("7",), max_model_len=1_000_000)
    setup = replace(setup, placement=_less(setup, P + G * T).model_copy(update={"teacher_servers": servers}))
    plan = make_plan(setup, _hardware(32))
    room = next(room for room in plan.rooms if room.role == "teacher")
    # Keys and values of 4 heads of 32 in 4 layers, float32.
    assert 0 < room.left < room.longest == 1_000_000 * 2 * 4 * 32 * 4 * 4
    (problem,) = plan.problems
    assert "one request of 1000000 tokens needs 3.8" in problem
    assert f"placement.teacher_servers.max_model_len = {P + T + 1}" in problem


def test_what_shares_a_device_adds_up(small: Path) -> None:
    setup = _setup(small)
    (device,) = make_plan(setup, _hardware(1)).devices
    assert device.devices == ("cpu",)
    held = [sum(size for _, size in use.held) for use in device.uses]
    working = [sum(size for _, size in use.working) for use in device.uses]
    assert [use.what for use in device.uses] == ["trainer", "student's engine", "teacher's engine", "libraries"]
    # They take turns, in one process.
    assert device.needed == sum(held) + max(working)
    apart = replace(setup, placement=setup.placement.model_copy(update={"teacher_device": "cuda:1"}))
    assert [found.devices for found in make_plan(apart, _hardware(1)).devices] == [("cpu",), ("cuda:1",)]


def test_processes_on_the_cpu_share_its_memory(small: Path) -> None:
    setup = replace(_setup(small), placement=_trainer(_setup(small), num_processes=3))
    use = trainer_memory(setup, on_gpu=False)
    alone, three = (sum(size for _, size in part) for part in (use.held, use.working))
    (device,) = make_plan(setup, _hardware(1)).devices
    others = [other for other in device.uses if other.what != "trainer"]
    assert len(device.uses) == 3 + len(others)
    # They compute at the same time, the engines before and after them.
    assert device.needed == 3 * (alone + three) + sum(size for other in others for _, size in other.held)
    found = make_plan(setup, replace(_hardware(1), memory={"cpu": device.needed - 1}))
    assert found.problems[0].startswith("the trainer, the student's engine and the teacher's engine need ")
    assert "placement.trainer.num_processes = 1" in found.problems[0]


def test_what_nobody_knows_of_a_device_is_unknown(small: Path) -> None:
    setup = _setup(small, placement=PlacementConfig(student_device="mps"))
    plan = make_plan(setup, _hardware(1))
    assert {device.devices: device.capacity for device in plan.devices} == {("mps:0",): None, ("cpu",): 64 * GIB}
    assert (plan.seconds, plan.problems) == (None, ())


def test_what_is_configured_is_said_of_gpus_where_there_are_any() -> None:
    hardware = HardwareConfig(memory_gib=2, tflops=1e6, bandwidth_gbs=1e6)
    alone = ask_hardware(PlacementConfig(hardware=hardware))
    assert (alone.memory["cpu"], alone.flops["cpu"], alone.bandwidth["cpu"]) == (2 * GIB, 1e18, 1e15)
    both = ask_hardware(PlacementConfig(hardware=hardware, student_device="cuda:0"))
    assert (both.memory["cuda"], both.flops["cuda"], both.bandwidth["cuda"]) == (2 * GIB, 1e18, 1e15)
    measured = ask_hardware(PlacementConfig())
    assert both.memory["cpu"] == measured.memory["cpu"] != 2 * GIB
    assert all(0 < speed["cpu"] < 1e15 for speed in (both.flops, both.bandwidth) if speed["cpu"])


def test_steps_of_a_server_are_as_large_as_its_flags_say() -> None:
    gpu = ServersConfig(devices=("0",))
    assert num_batched(gpu, 80 * GIB) == (8192, 1024)
    assert num_batched(gpu, 24 * GIB) == (2048, 256)
    flags = ("--max-num-batched-tokens=512", "--max-num-seqs", "16")
    assert num_batched(ServersConfig(devices=("0",), flags=flags), 80 * GIB) == (512, 16)


def test_tensor_parallel_halves_what_a_device_holds(small: Path) -> None:
    setup = _on_gpus(small)
    rooms = [
        server_room(
            "teacher",
            setup.teacher,
            setup.teacher_shape,
            ServersConfig(devices=("6", "7")[:count], tensor_parallel=count, max_model_len=4096),
            setup,
            24 * GIB,
        )
        for count in (1, 2)
    ]
    assert rooms[1].longest == rooms[0].longest / 2
    assert rooms[1].left - rooms[0].left >= 2 * setup.teacher_shape.num_parameters


# --- traffic and time ---------------------------------------------------------------------------------------------


def test_tables_have_the_size_of_real_ones(small: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return random.normal(-2.0, 1.5, shape).tolist()

    rollouts, replays = [], []
    for number in range(32 * G):
        place = {"sample_id": f"sample-{number // G}", "index": number % G}
        ids = random.integers(0, 150_000, T).tolist()
        text = "".join(random.choice(list("abcdefghijklmnop "), 4 * T))
        rollouts.append(
            Rollout(**place, policy="0" * 32, token_ids=ids, logprobs=numbers(T), text=text, truncated=False)
        )
        replays.append(
            Replay(
                **place,
                logprobs_positive=numbers(T),
                logprobs_negative=numbers(T),
                max_logprobs=numbers(T),
                topk_ids=random.integers(0, 150_000, (T, 10)).tolist(),
                topk_logprobs=numbers(T, 10),
            )
        )
    write_rows(tmp_path / "rollouts", rollouts, Rollout)
    write_rows(tmp_path / "replays", replays, Replay)
    traffic = {part.name: part for part in round_traffic(_setup(small, num_prompts=32))}
    for name in ("rollouts", "replays"):
        assert 0.95 < traffic[name].written / (tmp_path / name).stat().st_size < 1.3, name


def test_the_training_state_is_written_every_few_rounds(small: Path) -> None:
    setup = _setup(small, checkpoint_every=10, image_bytes=1000.0, num_prompts=4)
    traffic = {part.name: part for part in round_traffic(setup)}
    assert traffic["training state"].written == 12 * setup.student_shape.num_parameters / 10
    assert traffic["images"].read == 3 * 4 * 1000


def test_time_follows_from_speed(small: Path) -> None:
    setup = _on_gpus(small)
    plan = make_plan(setup, _hardware(80))
    stages = {stage.name: stage for stage in plan.stages}
    training, rollouts = stages["training"], stages["rollouts"]
    assert training.work is not None
    assert training.seconds == training.work.flops / 1e12
    assert rollouts.work is not None
    assert rollouts.work.decode_bytes / 1e11 > rollouts.work.decode_flops / 1e12
    assert rollouts.seconds == rollouts.work.flops / 1e12 + rollouts.work.decode_bytes / 1e11
    moved = sum(part.written + part.read for part in plan.traffic)
    assert stages["store"].seconds == moved / 1e9
    slower = make_plan(setup, replace(_hardware(80), flops={"cpu": 1e9, "cuda": None}))
    assert slower.seconds is None
    assert make_plan(replace(setup, prompt_tokens=None), _hardware(80)).stages == ()
