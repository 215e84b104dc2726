"""Whether a run fits into its devices, and where not, which settings change that: by trying them."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tasks.adapters.plan_memory import CPU, CUDA, GIB, ServerRoom, devices_memory, server_room
from tasks.adapters.workload import Setup, servers_of
from tasks.config import LoRAConfig

Memory = Mapping[str, float | None]
"""Bytes of a device, by its kind; what is not there is unknown."""
_LEAST_TOKENS = 2048
"""Half of it is the smallest limit that is proposed."""
_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Shares of a device's memory that are tried for a server."""


def server_rooms(setup: Setup, memory: Memory) -> tuple[ServerRoom, ...]:
    """Give the caches of the vLLM servers that the run starts."""
    found = []
    for role, model, shape, given in (
        ("student", setup.student, setup.student_shape, setup.placement.student_servers),
        ("teacher", setup.teacher, setup.teacher_shape, setup.placement.teacher_servers),
    ):
        servers = servers_of(model, given)
        capacity = memory.get(CUDA if given.devices else CPU)
        if servers is not None and not servers.urls and capacity is not None:
            found.append(server_room(role, model, shape, servers, setup, capacity))
    return tuple(found)


def _lacks(setup: Setup, memory: Memory) -> dict[str, str]:
    """Give what does not fit, by a name that a change of settings does not touch."""
    lacks = {}
    for room in server_rooms(setup, memory):
        if room.left < room.longest:
            lacks[f"cache of {room.role}'s server"] = (
                f"the {room.role}'s server has {max(room.left, 0.0) / GIB:.1f} GiB left for its cache on each device, "
                f"but one request of {room.num_tokens} tokens needs {room.longest / GIB:.1f}"
            )
    for device in devices_memory(setup, memory):
        if device.capacity is None or device.needed <= device.capacity:
            continue
        users = list(dict.fromkeys(use.what for use in device.uses if use.working or use.what.endswith("server")))
        number = len(device.devices)
        lacks.setdefault(
            " ".join(users),
            f"{_all(users)} need{'s' * (len(users) == 1)} {device.needed / GIB:.1f} GiB on "
            + (f"each of {number} devices, which have" if number > 1 else f"{device.devices[0]}, which has")
            + f" {device.capacity / GIB:.1f} (placement.hardware.memory_gib)",
        )
    return lacks


def _all(users: list[str]) -> str:
    named = [f"the {user}" for user in users]
    return " and ".join(([", ".join(named[:-1])] if named[1:] else []) + named[-1:])


def problems(setup: Setup, memory: Memory) -> Iterator[str]:
    """Say what does not fit, and which settings change that: each was tried."""
    lacks = _lacks(setup, memory)
    for name, message in lacks.items():
        # What helps here must not lack elsewhere.
        allowed = lacks.keys() - {name}

        def helps(changed: Setup, allowed: Set[str] = allowed) -> bool:
            return _lacks(changed, memory).keys() <= allowed

        changes = list(_changes(setup, name, helps))
        if alone := [change for change in changes if helps(change.apply(setup))]:
            yield f"{message}; set {', or '.join(change.text for change in alone)}"
        elif together := _together(setup, name, helps):
            yield f"{message}; set {', and '.join(change.text for change in together)}"
        else:
            yield f"{message}; take more devices, or such with more memory, or a smaller model"


@dataclass(frozen=True)
class _Change:
    """A setting, its value as a user writes it, and what it makes of a run."""

    setting: str
    value: str
    apply: Callable[[Setup], Setup]

    @property
    def text(self) -> str:
        return f"{self.setting} = {self.value}"


_Helps = Callable[[Setup], bool]


def _together(setup: Setup, name: str, helps: _Helps) -> list[_Change]:
    """Give changes that help together and of which none can be left out; none where all do not help."""
    changed, taken = setup, list[_Change]()
    while not helps(changed):
        done = {change.setting for change in taken}
        left = [change for change in _changes(changed, name, helps) if change.setting not in done]
        if not left:
            return []
        taken.append(left[0])
        changed = left[0].apply(changed)
    for change in tuple(taken):
        others = [other for other in taken if other is not change]
        if helps(_applied(setup, others)):
            taken = others
    return taken


def _applied(setup: Setup, changes: list[_Change]) -> Setup:
    for change in changes:
        setup = change.apply(setup)
    return setup


def _changes(setup: Setup, name: str, helps: _Helps) -> Iterator[_Change]:
    """Give settings that may make room, those first that cost least."""
    if "trainer" in name:
        trainer = setup.placement.trainer
        if trainer.sharding == "ddp" and trainer.total_processes > 1:
            yield _Change("placement.trainer.sharding", '"fsdp2"', _section("trainer", {"sharding": "fsdp2"}))
        if not trainer.gradient_checkpointing:
            yield _Change(
                "placement.trainer.gradient_checkpointing",
                "true",
                _section("trainer", {"gradient_checkpointing": True}),
            )
        if trainer.sharding == "ddp" and not trainer.devices and trainer.num_processes > 1:
            yield _Change("placement.trainer.num_processes", "1", _section("trainer", {"num_processes": 1}))
        if trainer.sharding == "fsdp2" and trainer.devices:
            doubled = {
                "num_processes": 2 * trainer.num_processes,
                "devices": (*trainer.devices, *(f"{device} more" for device in trainer.devices)),
            }
            yield _Change(
                "placement.trainer.num_processes",
                f"{doubled['num_processes']} with as many devices",
                _section("trainer", doubled),
            )
    if "trainer" in name or "engine" in name:
        yield _smaller(
            "placement.max_batch_tokens",
            setup.placement.max_batch_tokens,
            lambda tokens: partial(_with_placement, {"max_batch_tokens": tokens}),
            setup,
            helps,
        )
        if setup.max_prompt_tokens is not None:
            yield _smaller(
                "data.max_prompt_tokens",
                setup.max_prompt_tokens,
                lambda tokens: partial(replace, max_prompt_tokens=tokens),
                setup,
                helps,
            )
    if "trainer" in name and setup.optimizer.lora is None:
        adapters = setup.optimizer.model_copy(update={"lora": LoRAConfig()})
        yield _Change("optimizer.lora", "{ rank = 16 }", partial(replace, optimizer=adapters))
    for role in ("student", "teacher"):
        model = getattr(setup, role)
        # Training keeps its weights in float32 in either arithmetic.
        if model.dtype == "float32" and f"{role}'s" in name:
            narrow = model.model_copy(update={"dtype": "bfloat16"})
            yield _Change(f"{role}.dtype", '"bfloat16"', partial(replace, **{role: narrow}))
        if f"{role}'s server" in name and getattr(setup.placement, f"{role}_servers").devices:
            yield from _other_servers(setup, role, helps)


def _smaller(
    setting: str, value: int, change: Callable[[int], Callable[[Setup], Setup]], setup: Setup, helps: _Helps
) -> _Change:
    """Give the largest half, quarter, ... of a number of tokens that helps, else the smallest that is sensible."""
    tokens = value // 2
    while tokens > _LEAST_TOKENS and not helps(change(tokens)(setup)):
        tokens //= 2
    return _Change(setting, str(tokens), change(tokens))


def _other_servers(setup: Setup, role: str, helps: _Helps) -> Iterator[_Change]:
    name = f"{role}_servers"
    servers = getattr(setup.placement, name)

    def change(setting: str, text: str, **update: Any) -> _Change:
        return _Change(f"placement.{name}.{setting}", text, _section(name, update))

    nearest = sorted(_SHARES, key=lambda share: abs(share - servers.memory_share))
    shares = [change("memory_share", f"{share:g}", memory_share=share) for share in nearest]
    yield from [share for share in shares if helps(share.apply(setup))][:1]
    steps = "--max-num-batched-tokens"
    if not any(flag.startswith(steps) for flag in servers.flags):
        yield change("flags", f'["{steps}=2048"]', flags=(*servers.flags, f"{steps}=2048"))
    if setup.max_prompt_tokens is not None:
        # vLLM samples a token after what it replays.
        needed = setup.max_prompt_tokens + setup.max_new_tokens + 1
        if servers.max_model_len is None or needed < servers.max_model_len:
            yield change("max_model_len", str(needed), max_model_len=needed)
    doubled = 2 * servers.tensor_parallel
    yield change("tensor_parallel", f"{doubled} with as many devices for each replica", tensor_parallel=doubled)


def _section(name: str, update: dict[str, Any]) -> Callable[[Setup], Setup]:
    """Change settings of a section of the placement."""
    return lambda setup: _with_placement({name: getattr(setup.placement, name).model_copy(update=update)}, setup)


def _with_placement(update: dict[str, Any], setup: Setup) -> Setup:
    return replace(setup, placement=setup.placement.model_copy(update=update))
