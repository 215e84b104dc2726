"""What this machine's devices can do, asked or measured in a moment, where the configuration does not say."""

import os
import time

import torch

from tasks.adapters.plan_memory import GIB
from tasks.adapters.planner import Hardware
from tasks.config import PlacementConfig

_SIDE, _COPIED, _SECONDS = 512, 1 << 25, 0.1


def ask_hardware(placement: PlacementConfig) -> Hardware:
    """Give what devices can do: as configured, else as the device says; a CPU's speed is measured, a GPU's unknown.

    What is configured is said of the GPUs, or where the run has none, of the CPU.
    """
    config = placement.hardware
    kinds = {device.partition(":")[0] for device in (placement.student_device, placement.teacher_device)}
    if any(part.devices for part in (placement.trainer, placement.student_servers, placement.teacher_servers)):
        kinds.add("cuda")
    told = kinds - {"cpu"} or {"cpu"}
    memory: dict[str, float | None] = {"cpu": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
    if torch.cuda.is_available():
        memory["cuda"] = float(torch.cuda.get_device_properties(0).total_memory)
    if config.memory_gib is not None:
        memory |= dict.fromkeys(told, config.memory_gib * GIB)
    flops = {} if config.tflops is None else dict.fromkeys(told, config.tflops * 1e12)
    bandwidth = {} if config.bandwidth_gbs is None else dict.fromkeys(told, config.bandwidth_gbs * 1e9)
    if "cpu" in kinds:
        flops.setdefault("cpu", _cpu_flops())
        bandwidth.setdefault("cpu", _cpu_bandwidth())
    return Hardware(memory, flops, bandwidth, None if config.store_gbs is None else config.store_gbs * 1e9)


def _cpu_flops() -> float:
    """Measure a matrix product in float32, on the threads that torch has."""
    left = torch.ones(_SIDE, _SIDE)
    left @ left
    started, number = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < _SECONDS:
        left @ left
        number += 1
    return 2 * number * _SIDE**3 / passed


def _cpu_bandwidth() -> float:
    """Measure a sum over memory that no cache holds."""
    numbers = torch.ones(_COPIED)
    started, number = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < _SECONDS:
        numbers.sum()
        number += 1
    return 4 * number * _COPIED / passed
