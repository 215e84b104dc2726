"""What a round computes and moves: tokens, operations and bytes, by arithmetic over shapes and settings.

Legend: N prompts of P tokens, G responses of T tokens each, C tokens that a crop adds to a prompt.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.adapters.model_shape import ModelShape, Part
from tasks.config import ModelConfig, OptimizerConfig, PlacementConfig, ServersConfig, VLLMEngine
from vzero_core.config import View

FLOAT32 = 4
_SIZES = {"float32": FLOAT32, "bfloat16": 2}
_ROW_BYTES, _FILE_BYTES, _MANIFEST_BYTES = 60, 3_500, 2_600
"""Of a table's row its names and lists' lengths, of a file its schema, of an artefact its manifest; as measured."""
_NUMBER_BYTES, _TEXT_BYTES = 5, 2
"""Of a number in a table: itself, and in a short column its place in a dictionary; and of a token's text, packed."""


@dataclass(frozen=True)
class Setup:
    """All that a plan follows from.

    Attributes:
        student: path, arithmetic and engine.
        teacher: the same.
        student_shape: sizes of the student.
        teacher_shape: sizes of the teacher.
        optimizer: what learns.
        placement: devices and budgets.
        num_prompts: N, prompts of a round.
        num_responses: G.
        max_new_tokens: the longest response.
        num_shards: parts of a round that are sampled and replayed one by one.
        checkpoint_every: rounds between full training states.
        views: what the teacher replays.
        top_k: likeliest tokens that are stored of the target view.
        max_prompt_tokens: the longest prompt; None where nothing limits it.
        prompt_tokens: P, mean; None where it is unknown.
        crop_tokens: C, mean; None where it is unknown.
        response_tokens: T, mean.
        image_bytes: an image's file, mean; None where it is unknown.
    """

    student: ModelConfig
    teacher: ModelConfig
    student_shape: ModelShape
    teacher_shape: ModelShape
    optimizer: OptimizerConfig
    placement: PlacementConfig
    num_prompts: int
    num_responses: int
    max_new_tokens: int
    num_shards: int
    checkpoint_every: int
    views: tuple[View, ...]
    top_k: int
    max_prompt_tokens: int | None
    prompt_tokens: float | None
    crop_tokens: float | None
    response_tokens: float
    image_bytes: float | None


@dataclass(frozen=True)
class Work:
    """What one stage of a round computes.

    Attributes:
        name: of the stage.
        num_computed: tokens that pass through a model in parallel, a backward pass not counted.
        num_decoded: tokens that are sampled one after the other.
        flops: operations of `num_computed`, a backward pass included.
        decode_flops: operations of `num_decoded`.
        decode_bytes: what sampling reads from memory, all devices together.
        num_devices: that share it.
    """

    name: str
    num_computed: float
    num_decoded: float
    flops: float
    decode_flops: float
    decode_bytes: float
    num_devices: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of a round to and from the store, or where the images are.

    Attributes:
        name: what they are.
        written: in the mean of a round.
        read: in the mean of a round.
    """

    name: str
    written: float
    read: float


@dataclass(frozen=True)
class TrainingBatch:
    """A forward batch of the trainer: rows of a prompt and some of its responses.

    Attributes:
        num_prompts: rows.
        num_responses: of each row.
        num_parts: rows that a prompt's responses are cut into.
    """

    num_prompts: int
    num_responses: int
    num_parts: int


def bytes_of(dtype: str) -> int:
    """Give the bytes of a number."""
    return _SIZES[dtype]


def training_batch(num_prompt: float, num_response: float, setup: Setup) -> TrainingBatch:
    """Give the forward batches that `training_data.micro_batches` makes of prompts that are all alike.

    Args:
        num_prompt: P.
        num_response: T.
        setup: G, N and the token budget.
    """
    budget, group = setup.placement.max_batch_tokens, setup.num_responses
    if not setup.student_shape.packed:
        rows = int(budget // (num_prompt + num_response))
        return TrainingBatch(max(1, min(rows, setup.num_prompts * group)), 1, group)
    for parts in range(1, group + 1):
        share = -(-group // parts)
        cost = num_prompt + share * num_response
        if cost <= budget or parts == group:
            break
    return TrainingBatch(max(1, min(int(budget // cost), setup.num_prompts)), share, parts)


def num_rows(servers: ServersConfig | None, setup: Setup) -> float:
    """Give how many responses are sampled side by side by one server, or by the engine in the box (None).

    Args:
        servers: the student's.
        setup: with the tokens of prompt and response.
    """
    assert setup.prompt_tokens is not None, "asked where tokens are known"
    length = setup.prompt_tokens + setup.response_tokens
    if servers is None:
        groups = max(1, int(setup.placement.max_batch_tokens // (setup.num_responses * length)))
        return float(min(groups, setup.num_prompts) * setup.num_responses)
    cost = setup.prompt_tokens + setup.num_responses * setup.max_new_tokens
    groups = max(1, int(servers.max_tokens_in_flight // cost))
    replicas = max(1, len(servers.urls) or servers.replicas)
    return float(min(groups, -(-setup.num_prompts // replicas)) * setup.num_responses)


def round_work(setup: Setup) -> tuple[Work, ...]:
    """Give what the stages of a round compute; nothing where the length of prompts is unknown."""
    if setup.prompt_tokens is None or setup.crop_tokens is None:
        return ()
    return (_rollouts(setup), _replay(setup), _training(setup))


def _prompt_flops(shape: ModelShape, num_prompt: float) -> float:
    # Nearly all of a prompt is its image.
    return shape.vision_flops(num_prompt) + shape.language_flops(num_prompt, num_prompt**2)


def _rollouts(setup: Setup) -> Work:
    assert setup.prompt_tokens is not None, "known"
    shape, prompt, response = setup.student_shape, setup.prompt_tokens, setup.response_tokens
    decoded = setup.num_prompts * setup.num_responses * response
    servers = servers_of(setup.student, setup.placement.student_servers)
    rows = num_rows(servers, setup)
    size = bytes_of(setup.student.dtype)
    # Every step reads all weights once, and each row's keys, values and states.
    weights = size * (shape.language.num_parameters + shape.output)
    cache = shape.cache_bytes(prompt + response / 2, 1, size)
    return Work(
        name="rollouts",
        num_computed=setup.num_prompts * prompt,
        num_decoded=decoded,
        flops=setup.num_prompts * _prompt_flops(shape, prompt),
        decode_flops=shape.language_flops(decoded, decoded * (prompt + response / 2)) + shape.output_flops(decoded),
        decode_bytes=decoded * (weights / rows + cache),
        num_devices=_num_devices(servers),
    )


def _replay(setup: Setup) -> Work:
    assert setup.prompt_tokens is not None, "known"
    assert setup.crop_tokens is not None, "known"
    shape, prompt, response = setup.teacher_shape, setup.prompt_tokens, setup.response_tokens
    servers = servers_of(setup.teacher, setup.placement.teacher_servers)
    group = setup.num_responses
    crops = [0.0 if view == "none" else setup.crop_tokens for view in setup.views]
    if servers is None:
        # The image once for all views, each view once for its responses; the output layer sees responses alone.
        tokens, flops = prompt, _prompt_flops(shape, prompt)
        for crop in crops:
            tokens += crop + group * response
            flops += shape.vision_flops(crop) + shape.language_flops(crop, crop * (prompt + crop))
            flops += shape.language_flops(group * response, group * response * (prompt + crop + response))
            flops += shape.output_flops(group * response)
    else:
        tokens = flops = 0.0
        for crop in crops:
            length = prompt + crop + response
            if servers.read_prefix_cache:
                own, pairs = prompt + crop + group * response, (prompt + crop) ** 2 + group * response * length
            else:
                own, pairs = group * length, group * length**2
            tokens += own
            flops += shape.vision_flops(prompt) + shape.vision_flops(crop)
            # It computes the logits of a whole prompt to read the last rows.
            flops += shape.language_flops(own, pairs) + shape.output_flops(own)
    return Work("replay", setup.num_prompts * tokens, 0.0, setup.num_prompts * flops, 0.0, 0.0, _num_devices(servers))


def _training(setup: Setup) -> Work:
    assert setup.prompt_tokens is not None, "known"
    shape, prompt, response = setup.student_shape, setup.prompt_tokens, setup.response_tokens
    parts = training_batch(prompt, response, setup).num_parts
    responses = setup.num_responses * response
    tokens = setup.num_prompts * (parts * prompt + responses)
    language = shape.language_flops(parts * prompt + responses, parts * prompt**2 + responses * (prompt + response))
    vision, output = parts * shape.vision_flops(prompt), shape.output_flops(responses)
    learns = what_learns(shape, setup.optimizer)
    # Backward, gradients of inputs cost as much as forward, gradients of weights as much again; nothing goes back
    # into a tower that is fixed. The output layer computes its logits once more.
    backward = (1 + learns.language) * language + learns.passes_vision * (1 + learns.vision) * vision
    backward += (2 + learns.output) * output
    again = language + vision if setup.placement.trainer.gradient_checkpointing else 0.0
    epochs = setup.optimizer.epochs
    forward = language + vision + output
    return Work(
        name="training",
        num_computed=(1 + epochs) * tokens,
        num_decoded=0.0,
        # Once before the first update, for the log-probs that it starts from.
        flops=setup.num_prompts * (forward + epochs * (forward + backward + again)),
        decode_flops=0.0,
        decode_bytes=0.0,
        num_devices=setup.placement.trainer.total_processes,
    )


@dataclass(frozen=True)
class Learning:
    """What of a model learns.

    Attributes:
        num_parameters: that have gradients and moments.
        num_adapters: of those, in adapters.
        language: share of the language part's weights that have gradients of their own; 0 with adapters.
        vision: the same of the vision tower.
        output: whether the output layer's weights have gradients.
        passes_vision: whether gradients go back through the vision tower.
    """

    num_parameters: int
    num_adapters: int
    language: float
    vision: float
    output: bool
    passes_vision: bool


def what_learns(shape: ModelShape, config: OptimizerConfig) -> Learning:
    """Give what of a model learns under `optimizer.frozen` and `optimizer.lora`."""

    def learning(parts: tuple[Part, ...]) -> list[Part]:
        return [part for part in parts if not any(fnmatch.fnmatchcase(part.name, rule) for rule in config.frozen)]

    def size(parts: Iterable[Part], place: str | None = None) -> int:
        return sum(part.size for part in parts if place in (None, part.place))

    if config.lora is not None:
        target = config.lora.target
        fits = [part for part in learning(shape.adapters) if target == "all-linear" or re.fullmatch(target, part.name)]
        number = config.lora.rank * size(fits)
        return Learning(number, number, 0.0, 0.0, False, any(part.place == "vision" for part in fits))
    parts = learning(shape.parameters)
    language, vision = size(parts, "language"), size(parts, "vision")
    return Learning(
        num_parameters=size(parts),
        num_adapters=0,
        language=language / size(shape.parameters, "language"),
        vision=vision / size(shape.parameters, "vision"),
        output=size(parts, "embedding" if shape.tied else "output") > 0,
        passes_vision=vision > 0,
    )


def round_traffic(setup: Setup) -> tuple[Traffic, ...]:
    """Give what a round writes to the store and reads from it; the images only where their size is known."""
    rows = setup.num_prompts * setup.num_responses
    tokens = rows * setup.response_tokens
    frame = rows * _ROW_BYTES + setup.num_shards * (_FILE_BYTES + _MANIFEST_BYTES)
    rollouts = tokens * (2 * _NUMBER_BYTES + _TEXT_BYTES) + frame
    replays = tokens * _NUMBER_BYTES * (len(setup.views) + 1 + 2 * setup.top_k) + frame
    weights = rows * 2 * _NUMBER_BYTES + frame
    shape = setup.student_shape
    learning = what_learns(shape, setup.optimizer)
    state = FLOAT32 * (shape.num_parameters + learning.num_adapters + 2 * learning.num_parameters)
    traffic = [
        Traffic("rollouts", rollouts, 2 * rollouts),
        Traffic("replays", replays, 2 * replays),
        Traffic("gate's weights", weights, weights),
        Traffic("training state", state / setup.checkpoint_every, 0.0),
    ]
    if setup.image_bytes is not None:
        # At most: decoded ones are kept as long as there is room.
        traffic.append(Traffic("images", 0.0, 3 * setup.num_prompts * setup.image_bytes))
    return tuple(traffic)


def servers_of(model: ModelConfig, servers: ServersConfig) -> ServersConfig | None:
    """Give the servers that a model runs on; None for the engine in the box."""
    return servers if isinstance(model.engine, VLLMEngine) else None


def _num_devices(servers: ServersConfig | None) -> int:
    return 1 if servers is None else len(servers.urls) or len(servers.devices) or servers.replicas
