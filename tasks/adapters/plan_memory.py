"""How much memory a run needs on each device, by arithmetic; where it cannot be exact, it is too high.

Activations are counted as what a layer keeps for its backward pass: so many numbers per token for each of its widths,
counted by hooks on saved tensors (docs/PLAN.md).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tasks.adapters.model_shape import DELTA_CHUNK, ModelShape
from tasks.adapters.output_layer import CHUNK_LOGITS
from tasks.adapters.workload import FLOAT32, Setup, bytes_of, servers_of, training_batch, what_learns
from tasks.config import InProcessEngine, ModelConfig, ServersConfig

GIB = 1 << 30
CPU, CUDA = "cpu", "cuda"
_PROCESS_GIB, _DEVICE_GIB = 0.75, 2.0
"""Of a process: libraries in main memory; on a GPU its context, communication buffers and gaps between tensors."""
_CPU_CACHE_GIB = 1.0
"""Of a vLLM server on CPU (`vllm_command.server_environment`)."""
_BACKWARD = 1.25
"""A layer that is computed again, with the gradients of what it keeps; as measured."""
_SCORED_TOKENS = 512
"""Tokens whose log-probs the engine in the box has in memory at a time."""


@dataclass(frozen=True)
class Use:
    """What one thing takes of one device, in bytes.

    Attributes:
        what: who needs it.
        held: from start to end of the run, by name.
        working: while it works; things that take turns share it.
    """

    what: str
    held: tuple[tuple[str, float], ...]
    working: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ServerRoom:
    """What of a vLLM server's share of a device is left for its cache.

    Attributes:
        role: of its model.
        left: bytes for keys, values and states.
        longest: bytes that one request of the longest length takes.
        num_tokens: of that request.
    """

    role: str
    left: float
    longest: float
    num_tokens: int


@dataclass(frozen=True)
class DeviceMemory:
    """One device, or several that hold the same.

    Attributes:
        devices: as torch names them.
        uses: what is on each of them.
        capacity: bytes of each; None where nobody says.
    """

    devices: tuple[str, ...]
    uses: tuple[Use, ...]
    capacity: float | None

    @property
    def needed(self) -> float:
        """Bytes that are held, and the most that one of those that take turns works with.

        Processes of the trainer do not take turns.
        """
        working = Counter[str]()
        for use in self.uses:
            working[use.what] += sum(size for _, size in use.working)  # type: ignore[assignment]
        return sum(size for use in self.uses for _, size in use.held) + max(working.values(), default=0)


def devices_memory(setup: Setup, capacity: Mapping[str, float | None]) -> tuple[DeviceMemory, ...]:
    """Give what every device of one machine holds, devices that hold the same together.

    Args:
        setup: the run.
        capacity: bytes of a device, by its kind, such as "cpu" and "cuda".
    """
    placement, trainer = setup.placement, setup.placement.trainer
    placed: dict[str, list[Use]] = {}

    def place(device: str, use: Use) -> None:
        kind, _, number = device.partition(":")
        placed.setdefault(kind if kind == CPU else f"{kind}:{number or 0}", []).append(use)

    where = [f"cuda:{device}" for device in trainer.devices]
    for device in where or [placement.student_device] * trainer.num_processes:
        place(device, trainer_memory(setup, on_gpu=not device.startswith(CPU)))
    for role, model, shape, servers, device in (
        ("student", setup.student, setup.student_shape, placement.student_servers, placement.student_device),
        ("teacher", setup.teacher, setup.teacher_shape, placement.teacher_servers, placement.teacher_device),
    ):
        if isinstance(model.engine, InProcessEngine):
            place(device, engine_memory(role, model, shape, setup))
        elif not servers.urls:
            for number in servers.devices or [None] * servers.replicas:
                name = CPU if number is None else f"cuda:{number}"
                place(name, server_memory(role, model, shape, setup, capacity.get(CPU if number is None else CUDA)))
    groups: dict[tuple[str, tuple[Use, ...]], list[str]] = {}
    for device, uses in placed.items():
        kind = device.partition(":")[0]
        own = _DEVICE_GIB if kind != CPU else _PROCESS_GIB
        # The engines in the box, and a trainer that is alone, are in the process of the run; a server on a GPU counts
        # its own libraries into its share.
        alone = trainer.total_processes == 1
        inside = any(use.what.endswith("engine") or (use.what == "trainer" and alone) for use in uses)
        processes = inside + sum(
            (use.what == "trainer" and not alone) or (use.what.endswith("server") and kind == CPU) for use in uses
        )
        libraries = (Use("libraries", (("libraries", own * GIB * processes),)),) if processes else ()
        whole = (*uses, *libraries)
        groups.setdefault((kind, whole), []).append(device)
    return tuple(DeviceMemory(tuple(devices), uses, capacity.get(kind)) for (kind, uses), devices in groups.items())


# --- the trainer --------------------------------------------------------------------------------------------------


def trainer_memory(setup: Setup, *, on_gpu: bool) -> Use:
    """Give what one process of the trainer takes.

    Weights, gradients and AdamW's two moments are float32 in every arithmetic. FSDP2 cuts them into equal parts.
    """
    shape, trainer = setup.student_shape, setup.placement.trainer
    learning = what_learns(shape, setup.optimizer)
    sharded = trainer.sharding == "fsdp2"
    parts = trainer.total_processes if sharded else 1
    weights = FLOAT32 * (shape.num_parameters + learning.num_adapters)
    learned = FLOAT32 * learning.num_parameters / parts
    size = bytes_of(setup.student.dtype)
    passing = max(_passing(setup, size, prompt) for prompt in _prompt_lengths(setup))
    if sharded:
        # Embedding, output layer and vision's first layers stay whole; of the layers, one and the next, each with the
        # buffer that it is gathered into, and a gradient with its own.
        largest = shape.language.num_parameters / shape.language.num_layers
        passing += FLOAT32 * (shape.embedding + shape.output * (not shape.tied) + 6 * largest)
    # On a GPU the optimizer takes all roots at once, when the activations are gone.
    stepping = learned if on_gpu else 0.0
    buckets = learned if trainer.total_processes > 1 and not sharded else 0.0
    return Use(
        "trainer",
        held=(("weights", weights / parts), ("moments", 2 * learned)),
        working=(("gradients", learned + buckets), ("forward and backward", max(passing, stepping))),
    )


def _prompt_lengths(setup: Setup) -> tuple[float, float]:
    """Give the usual length of a prompt and the longest: many short ones can take more than one long one."""
    mean = setup.prompt_tokens or setup.max_prompt_tokens or setup.placement.max_batch_tokens
    return mean, setup.max_prompt_tokens or mean


def _passing(setup: Setup, size: int, prompt: float) -> float:
    """Give the bytes that a forward pass and its backward pass take beside weights and gradients, at their largest."""
    kept, again = activations(setup, size, prompt)
    logits, gradients = _output_layer(setup, size, prompt)
    # Autocast keeps the copies that it makes of weights until the forward pass ends.
    copies = size * setup.student_shape.num_parameters if size < FLOAT32 else 0.0
    return kept + max(copies + logits, _BACKWARD * again) + gradients


def activations(setup: Setup, size: int, prompt: float) -> tuple[float, float]:
    """Give the bytes that a forward pass of the trainer keeps until its backward pass, and of a layer computed again.

    Args:
        setup: the run.
        size: bytes of a number in its arithmetic.
        prompt: tokens of each prompt.
    """
    shape, response = setup.student_shape, float(setup.max_new_tokens)
    part, vision = shape.language, shape.vision
    batch = training_batch(prompt, response, setup)
    tokens = batch.num_prompts * (prompt + batch.num_responses * response)
    # Each response reads a copy of its prompt's keys and values.
    continued = batch.num_prompts * batch.num_responses * (prompt + response)
    layer = tokens * (28 * part.hidden + 4 * size * part.mlp)
    full = layer + tokens * size * ((10 if part.gated else 7) * part.queries + 4 * part.keys)
    full += continued * 2 * size * part.keys
    # Linear attention computes in float32, in chunks that the last one of a row fills with padding.
    padded = tokens + DELTA_CHUNK * batch.num_prompts * (1 + batch.num_responses)
    values = part.linear_heads * part.linear_value
    states = part.linear_heads * part.linear_key * part.linear_value / DELTA_CHUNK
    linear = layer + padded * (96 * values + 12 * part.linear_heads * part.linear_key + 8 * states)
    linear += padded * 21 * DELTA_CHUNK * part.linear_heads
    patches = batch.num_prompts * prompt * vision.merge
    block = patches * size * ((16 if vision.gated else 11) * vision.hidden + (4 if vision.gated else 2) * vision.mlp)
    pixels = 2 * patches * FLOAT32 * vision.patch
    ends = 3 * FLOAT32 * tokens * part.hidden
    if not setup.placement.trainer.gradient_checkpointing:
        return ends + pixels + part.num_full * full + part.num_linear * linear + vision.num_layers * block, 0.0
    kept = FLOAT32 * (part.num_layers * tokens * part.hidden + vision.num_layers * patches * vision.hidden)
    return ends + pixels + kept, max(full if part.num_full else 0.0, linear if part.num_linear else 0.0, block)


def _output_layer(setup: Setup, size: int, prompt: float) -> tuple[float, float]:
    """Give the bytes of the output layer's logits, a chunk at a time, and of its weights' gradients."""
    shape = setup.student_shape
    batch = training_batch(prompt, setup.max_new_tokens, setup)
    tokens = batch.num_prompts * batch.num_responses * setup.max_new_tokens
    if shape.packed:
        logits = (FLOAT32 + 2 * size) * min(CHUNK_LOGITS, tokens * shape.vocabulary)
    else:
        # All at once; as measured.
        logits = (6 * FLOAT32 + 2 * size) * tokens * shape.vocabulary
    learns = what_learns(shape, setup.optimizer).output
    # Where the embedding is the same tensor, its own gradient comes on top.
    return logits, FLOAT32 * shape.output * (2 if shape.tied else 1) if learns else 0.0


# --- engines ------------------------------------------------------------------------------------------------------


def engine_memory(role: str, model: ModelConfig, shape: ModelShape, setup: Setup) -> Use:
    """Give what the engine in the box takes: weights, cache of a forward batch, logits."""
    size, budget, group = bytes_of(model.dtype), setup.placement.max_batch_tokens, setup.num_responses
    crop = (setup.crop_tokens or 0.0) if role == "teacher" else 0.0
    prompt = (setup.prompt_tokens or setup.max_prompt_tokens or budget) + crop
    response = setup.max_new_tokens
    longest = max(budget, ((setup.max_prompt_tokens or 0) + crop + response) * group)
    length = prompt + response
    rows = max(group, budget // length)
    part, vision = shape.language, shape.vision
    prompts = rows / group * prompt
    per_token = 12 * part.hidden + size * (3 * part.mlp + 4 * part.queries)
    patches = prompts * vision.merge
    block = patches * (size * (10 * vision.hidden + 2 * vision.mlp) + FLOAT32 * vision.patch)
    own = shape.cache_bytes(prompts, rows / group, size)
    scored = min(max(_SCORED_TOKENS, response), rows * response) * shape.vocabulary * (size + 2 * FLOAT32)
    sampled = rows * shape.vocabulary * 4 * 8 if role == "student" else 0.0
    # In main memory new weights are read once more, and once again to compare.
    exchanged = (
        2.0 * size * shape.num_parameters if role == "student" and setup.placement.student_device == CPU else 0.0
    )
    reading = own + max(prompts * per_token, block)
    # The prompts' own cache, and a copy of it for each response.
    answering = own + shape.cache_bytes(longest, rows, size) + max(rows * response * per_token, scored, sampled)
    return Use(
        f"{role}'s engine",
        held=(("weights", size * shape.num_parameters),),
        working=(("cache and forward", max(reading, answering, exchanged)),),
    )


def server_room(
    role: str, model: ModelConfig, shape: ModelShape, servers: ServersConfig, setup: Setup, capacity: float
) -> ServerRoom:
    """Give what a vLLM server has left for its cache.

    Args:
        role: student or teacher.
        model: its arithmetic.
        shape: its sizes.
        servers: the role's servers.
        setup: the run.
        capacity: bytes of a device.
    """
    size, longest = bytes_of(model.dtype), servers.max_model_len or shape.context
    parallel = servers.tensor_parallel
    heads = min(parallel, shape.language.key_heads)
    request = shape.cache_bytes(longest, 1, size) / heads
    if not servers.devices:
        return ServerRoom(role, _CPU_CACHE_GIB * GIB, request, longest)
    weights = size * shape.num_parameters / parallel
    own = weights + _server_forward(shape, servers, size, longest, capacity) + _DEVICE_GIB * GIB
    return ServerRoom(role, servers.memory_share * capacity - own, request, longest)


def server_memory(role: str, model: ModelConfig, shape: ModelShape, setup: Setup, capacity: float | None) -> Use:
    """Give what a vLLM server takes of one of its devices."""
    servers = servers_of(model, getattr(setup.placement, f"{role}_servers"))
    assert servers is not None, "asked for servers alone"
    size = bytes_of(model.dtype)
    weights = size * shape.num_parameters / servers.tensor_parallel
    held: tuple[tuple[str, float], ...]
    if not servers.devices or capacity is None:
        forward = _server_forward(shape, servers, size, servers.max_model_len or shape.context, capacity or 0.0)
        held = (("weights", weights), ("forward", forward))
        # A share of a device of unknown size is unknown.
        if not servers.devices:
            held = (*held, ("cache", _CPU_CACHE_GIB * GIB))
    else:
        room = server_room(role, model, shape, servers, setup, capacity)
        forward = servers.memory_share * capacity - weights - room.left
        held = (("weights", weights), ("forward, libraries", forward), ("cache", room.left))
    if role == "teacher":
        # vLLM takes the log-softmax of all logits of a step's prompts; it does not reserve room for that.
        logits = num_batched(servers, capacity or 0.0)[0] * shape.vocabulary * (size + FLOAT32 + 1)
        held = (*held, ("prompts' logits", logits))
    return Use(f"{role}'s server", held)


def num_batched(servers: ServersConfig, capacity: float) -> tuple[int, int]:
    """Give the tokens and the requests of one step of a vLLM server: its flags, or vLLM 0.32's defaults."""
    tokens, requests = (8192, 1024) if capacity >= 70 * GIB else (2048, 256)
    if capacity >= 160 * GIB:
        tokens = 16_384
    if not servers.devices:
        tokens, requests = max(4096, servers.max_model_len or 0), 128
    flags = [part for flag in servers.flags for part in flag.split("=", 1)]
    given = dict(pairwise(flags))
    return int(given.get("--max-num-batched-tokens", tokens)), int(given.get("--max-num-seqs", requests))


def _server_forward(shape: ModelShape, servers: ServersConfig, size: int, longest: int, capacity: float) -> float:
    """Give the bytes of a step of a vLLM server: one layer, the logits that it samples from, one largest image."""
    tokens, requests = num_batched(servers, capacity)
    part, vision = shape.language, shape.vision
    layer = tokens * size * (8 * part.hidden + (3 * part.mlp + 4 * part.queries) / servers.tensor_parallel)
    logits = min(requests, tokens) * shape.vocabulary * (size + 2 * FLOAT32)
    image = longest * (vision.merge * size * (8 * vision.hidden + 2 * vision.mlp) + size * part.hidden)
    return max(layer + logits, image)
