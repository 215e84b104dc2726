"""The plan of a run: tokens, operations, memory, store traffic and time of a round, and whether it fits."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tasks.adapters.plan_fit import problems, server_rooms
from tasks.adapters.plan_memory import CPU, CUDA, DeviceMemory, ServerRoom, devices_memory
from tasks.adapters.workload import Setup, Traffic, Work, round_traffic, round_work, servers_of
from vzero_core.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """What a device can do, by its kind, such as "cpu" and "cuda"; what is not there is unknown.

    Attributes:
        memory: bytes.
        flops: operations a second.
        bandwidth: bytes a second of its memory.
        store: bytes a second to and from the store; None where it is unknown.
    """

    memory: Mapping[str, float | None]
    flops: Mapping[str, float | None]
    bandwidth: Mapping[str, float | None]
    store: float | None


@dataclass(frozen=True)
class Stage:
    """A stage of a round, and how long it takes.

    Attributes:
        work: what it computes; None for what is only moved.
        name: of the stage.
        seconds: None where it is unknown.
    """

    name: str
    work: Work | None
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run takes, before it starts.

    Attributes:
        setup: what it follows from.
        hardware: the same.
        stages: of one round; none where the length of prompts is unknown.
        devices: memory of one machine's devices.
        rooms: caches of the vLLM servers that the run starts.
        traffic: of one round.
        problems: why it cannot fit; each says which setting to change.
    """

    setup: Setup
    hardware: Hardware
    stages: tuple[Stage, ...]
    devices: tuple[DeviceMemory, ...]
    rooms: tuple[ServerRoom, ...]
    traffic: tuple[Traffic, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of a round, one stage after the other; None where that of a stage is unknown."""
        if not self.stages or any(stage.seconds is None for stage in self.stages):
            return None
        return sum(stage.seconds or 0.0 for stage in self.stages)


def make_plan(setup: Setup, hardware: Hardware) -> Plan:
    """Give the plan of a run.

    Args:
        setup: the run.
        hardware: the machine.
    """
    traffic = round_traffic(setup)
    return Plan(
        setup=setup,
        hardware=hardware,
        stages=tuple(_stages(setup, traffic, hardware)),
        devices=devices_memory(setup, hardware.memory),
        rooms=server_rooms(setup, hardware.memory),
        traffic=traffic,
        problems=tuple(problems(setup, hardware.memory)),
    )


def require_fit(plan: Plan) -> None:
    """Stop a run that cannot fit.

    Raises:
        ConfigError: a device lacks memory, or a server's cache cannot hold one request; it says what to change.
    """
    if plan.problems:
        raise ConfigError("\n".join(plan.problems))


# --- time ---------------------------------------------------------------------------------------------------------


def _stages(setup: Setup, traffic: tuple[Traffic, ...], hardware: Hardware) -> Iterator[Stage]:
    works = round_work(setup)
    for work in works:
        kind = _kind_of(setup, work.name)
        flops, bandwidth = hardware.flops.get(kind), hardware.bandwidth.get(kind)
        seconds = None
        if flops is not None and (bandwidth is not None or not work.decode_bytes):
            # A step of sampling waits for memory, or where many rows are sampled at once, for arithmetic.
            sampling = max(work.decode_bytes / (bandwidth or math.inf), work.decode_flops / flops)
            seconds = (work.flops / flops + sampling) / work.num_devices
        yield Stage(work.name, work, seconds)
    if works and hardware.store is not None:
        yield Stage("store", None, sum(part.written + part.read for part in traffic) / hardware.store)


def _kind_of(setup: Setup, stage: str) -> str:
    placement = setup.placement
    if stage == "training":
        return CUDA if placement.trainer.devices else placement.student_device.partition(":")[0]
    student = stage == "rollouts"
    model = setup.student if student else setup.teacher
    servers = servers_of(model, placement.student_servers if student else placement.teacher_servers)
    if servers is None:
        return (placement.student_device if student else placement.teacher_device).partition(":")[0]
    return CUDA if servers.devices or servers.urls else CPU
