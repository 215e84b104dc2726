"""What a run takes, before it starts: `python -m flows.plan --config my.toml`; fails where it cannot fit."""

import argparse
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from tasks.adapters.dataset import FACTS, SAMPLES
from tasks.adapters.hardware import ask_hardware
from tasks.adapters.model_shape import read_shape
from tasks.adapters.plan_memory import GIB
from tasks.adapters.planner import Plan, make_plan, require_fit
from tasks.adapters.row_facts import RowFacts
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.adapters.workload import Setup
from tasks.artifacts import ArtifactRef, Sample
from tasks.config import VLLMEngine
from vzero_core.config import ForwardKLTopKLoss, required_views
from vzero_core.errors import InputError, VZeroError

log = logging.getLogger("vzero.plan")

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class DataFigures:
    """Means over the samples; None is unknown.

    Attributes:
        prompt_tokens: of the student's prompt.
        longest_prompt_tokens: of the longest one.
        crop_tokens: that a crop adds to it.
        image_bytes: of an image's file.
    """

    prompt_tokens: float | None
    longest_prompt_tokens: int | None
    crop_tokens: float | None
    image_bytes: float | None


def data_figures(store: Store, samples: ArtifactRef) -> DataFigures:
    """Give what the validation found of the samples' prompts and images.

    Args:
        store: where the validation's tables are.
        samples: the validation.
    """
    images = {row.id: row.image.size_bytes for row in read_rows(store.read(samples, SAMPLES), Sample)}
    facts = [row for row in read_rows(store.read(samples, FACTS), RowFacts) if row.id in images]
    prompts = [row.student_tokens for row in facts if row.student_tokens is not None]
    crops = [
        row.positive_tokens - row.student_tokens
        for row in facts
        if row.student_tokens is not None and row.positive_tokens is not None
    ]
    return DataFigures(_mean(prompts), max(prompts, default=None), _mean(crops), _mean(list(images.values())))


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None


def check_plan(config: RunConfig, store: Store, samples: ArtifactRef) -> None:
    """Print what a run takes whose data are validated; where nobody can say, it goes on with a warning.

    Args:
        config: the whole configuration.
        store: where the validation's tables are.
        samples: the validation.

    Raises:
        ConfigError: it cannot fit.
    """
    try:
        plan = plan_run(config, **asdict(data_figures(store, samples)))
    except InputError as error:
        # A model of an unusual build can be trained without a plan.
        log.warning("there is no plan of this run: %s", error)
        return
    show_plan(plan)
    require_fit(plan)


def plan_run(
    config: RunConfig,
    *,
    prompt_tokens: float | None,
    crop_tokens: float | None,
    longest_prompt_tokens: int | None = None,
    response_tokens: float | None = None,
    image_bytes: float | None = None,
) -> Plan:
    """Give the plan of a run; models' folders need a config.json and no weights.

    Args:
        config: the whole configuration.
        prompt_tokens: of the student's prompt, mean; None where it is unknown.
        crop_tokens: that a crop adds to it, mean; None for as many as the prompt has.
        longest_prompt_tokens: of the longest one; None for `data.max_prompt_tokens`.
        response_tokens: mean; None for the longest that a response can be.
        image_bytes: of an image's file, mean; None where it is unknown.

    Raises:
        InputError: a model's folder has no config.json that can be read.
    """
    config = resolve_paths(config, PROJECT)
    setup = Setup(
        student=config.student,
        teacher=config.teacher,
        student_shape=read_shape(config.student.path),
        teacher_shape=read_shape(config.teacher.path),
        optimizer=config.optimizer,
        placement=config.placement,
        num_prompts=config.rounds.prompts_per_round,
        num_responses=config.sampling.num_responses,
        max_new_tokens=config.sampling.max_new_tokens,
        num_shards=config.rounds.num_shards,
        checkpoint_every=config.checkpoint.every,
        views=required_views(config.gate, config.replay.target),
        top_k=config.loss.k if isinstance(config.loss, ForwardKLTopKLoss) else 0,
        max_prompt_tokens=longest_prompt_tokens or config.data.max_prompt_tokens,
        prompt_tokens=prompt_tokens,
        crop_tokens=prompt_tokens if crop_tokens is None else crop_tokens,
        response_tokens=response_tokens or config.sampling.max_new_tokens,
        image_bytes=image_bytes,
    )
    return make_plan(setup, ask_hardware(config.placement))


def show_plan(plan: Plan) -> None:
    """Print what a round takes, and what every device needs."""
    console = Console()
    if plan.stages:
        console.print(_work(plan))
    else:
        console.print("The plan of a round: tokens and time are unknown, for the length of prompts is", highlight=False)
    for device in plan.devices:
        there_is = _UNKNOWN if device.capacity is None else f"{device.capacity / GIB:,.1f}"
        console.print(
            f"- {', '.join(device.devices)}: needs {device.needed / GIB:,.1f} of {there_is} GiB", highlight=False
        )
    written, read = (_figure(sum(getattr(part, name) for part in plan.traffic) / 1e6) for name in ("written", "read"))
    console.print(f"- store and images: writes {written} MB and reads {read} MB a round", highlight=False)


def _show_details(plan: Plan) -> None:
    console = Console()
    console.print(_models(plan))
    show_plan(plan)
    for table in (_memory(plan), _traffic(plan)):
        console.print(table)
    for line in _assumptions(plan):
        console.print(f"- {line}", soft_wrap=True, highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def _models(plan: Plan) -> Table:
    table = _table("Models, parameters", "part", "student", "teacher")
    shapes = (plan.setup.student_shape, plan.setup.teacher_shape)
    for place in ("language", "vision", "embedding", "output"):
        sizes = (sum(part.size for part in shape.parameters if part.place == place) for shape in shapes)
        table.add_row(place, *(f"{size:,}" for size in sizes))
    table.add_row("all", *(f"{shape.num_parameters:,}" for shape in shapes))
    return table


def _work(plan: Plan) -> Table:
    table = _table("The plan of a round", "stage", "tokens computed", "tokens sampled", "TFLOP", "seconds")
    for stage in plan.stages:
        work = stage.work
        figures = [""] * 3
        if work is not None:
            figures = [
                f"{work.num_computed:,.0f}",
                f"{work.num_decoded:,.0f}" if work.num_decoded else "",
                _figure((work.flops + work.decode_flops) / 1e12),
            ]
        table.add_row(stage.name, *figures, _figure(stage.seconds))
    table.add_row("all, in turn", "", "", "", _figure(plan.seconds))
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(plan: Plan) -> Table:
    table = _table("Memory of each device, GiB", "device", "what", "of which", "GiB")
    for device in plan.devices:
        name = ", ".join(device.devices)
        for use in device.uses:
            for part, size in (*use.held, *use.working):
                table.add_row(name, use.what, part, f"{size / GIB:,.2f}")
                name = ""
        table.add_section()
    for room in plan.rooms:
        table.add_row(
            f"{room.role}'s server", "one request", f"{room.num_tokens:,} tokens", f"{room.longest / GIB:,.2f}"
        )
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("Store and images, MB a round", "what", "written", "read")
    for part in plan.traffic:
        table.add_row(part.name, f"{part.written / 1e6:,.3f}", f"{part.read / 1e6:,.3f}")
    return table


def _assumptions(plan: Plan) -> list[str]:
    setup, hardware = plan.setup, plan.hardware
    means = (setup.prompt_tokens, setup.crop_tokens, setup.response_tokens)
    prompt, crop, response = (_UNKNOWN if value is None else f"{value:,.0f}" for value in means)
    longest = f"up to {setup.max_prompt_tokens:,}" if setup.max_prompt_tokens else "that length"
    speeds = []
    for kind in sorted({name.partition(":")[0] for device in plan.devices for name in device.devices}):
        flops, bandwidth = hardware.flops.get(kind), hardware.bandwidth.get(kind)
        speed = _figure(None if flops is None else flops / 1e12)
        memory = _figure(None if bandwidth is None else bandwidth / 1e9)
        speeds.append(f"{kind} {speed} TFLOPS and {memory} GB/s")
    lines = [
        f"tokens: prompt {prompt}, crop {crop}, response {response} in the mean; memory is counted for responses of "
        f"{setup.max_new_tokens:,} and prompts of {longest}",
        f"time: arithmetic alone, at {', '.join(speeds)} of a device (placement.hardware); images, servers' waiting, "
        "exchange of weights and Prefect are left out",
    ]
    if isinstance(setup.teacher.engine, VLLMEngine) and not setup.placement.teacher_servers.read_prefix_cache:
        lines.append("replay: vLLM computes the prompt once for every response (read_prefix_cache is off)")
    if setup.image_bytes is None:
        lines.append("images: read up to three times a round; their size is unknown")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the plan of a configuration; 1 where it cannot fit."""
    parser = argparse.ArgumentParser(prog="python -m flows.plan", description="Print what a run takes.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world is planned")
    parser.add_argument("--prompt-tokens", type=int, help="of a prompt, image included; none: unknown")
    parser.add_argument("--crop-tokens", type=int, help="that a crop adds; none: as many as the prompt has")
    parser.add_argument("--response-tokens", type=int, help="of a response; none: sampling.max_new_tokens")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config) if given.config else RunConfig()
        torch.set_num_threads(config.placement.threads)
        plan = plan_run(
            config,
            prompt_tokens=given.prompt_tokens,
            crop_tokens=given.crop_tokens,
            response_tokens=given.response_tokens,
        )
        _show_details(plan)
        require_fit(plan)
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
