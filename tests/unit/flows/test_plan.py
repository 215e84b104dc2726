"""The plan of a configuration, from the command line and for the models that the method was published with."""

from pathlib import Path
from typing import Any

import pytest
from support.published_models import save_published_models
from transformers import AutoConfig

from flows.config import PROJECT, RunConfig, load_config
from flows.plan import DataFigures, check_plan, data_figures, main, plan_run
from tasks.adapters.dataset import FACTS, SAMPLES
from tasks.adapters.model_shape import read_shape
from tasks.adapters.planner import require_fit
from tasks.adapters.row_facts import RowFacts
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import write_rows
from tasks.artifacts import ArtifactRef, ImageRef, Job, Sample
from vzero_core.errors import ConfigError

ONE_NODE = PROJECT / "deployments" / "configs" / "one-node.toml"
TOKENS = {"prompt_tokens": 2800, "crop_tokens": 700, "response_tokens": 1000}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published_models(tmp_path_factory.mktemp("models"))


def _one_node(models: Path, **hardware: Any) -> RunConfig:
    values = load_config(ONE_NODE).model_dump()
    for role in ("student", "teacher"):
        values[role]["path"] = str(models / Path(values[role]["path"]).name)
    values["placement"]["hardware"] |= hardware
    return RunConfig.model_validate(values)


def test_parameters_are_as_published(models: Path) -> None:
    # 55.56 GB in bfloat16 are 27.78 billion; 0.42 of them are a layer for speculation, which transformers leaves out:
    # a joint of 2 x 5120 by 5120, and a layer with full attention.
    attention = 5120 * (2 * 24 + 2 * 4 + 24) * 256
    speculation = 2 * 5120 * 5120 + attention + 3 * 5120 * 17_408
    assert read_shape(str(models / "Qwen3.5-27B")).num_parameters + speculation == pytest.approx(27.78e9, rel=1e-3)
    assert read_shape(str(models / "Qwen3.5-4B")).num_parameters == pytest.approx(4.54e9, rel=1e-3)
    # Published without the vision tower.
    smaller = read_shape(str(models / "Qwen3.5-9B"))
    language = sum(part.size for part in smaller.parameters if part.place != "vision")
    assert language == pytest.approx(8.95e9, rel=1e-3)


def test_one_node_fits(models: Path) -> None:
    plan = plan_run(_one_node(models), **TOKENS)
    require_fit(plan)
    needed = {device.devices: device.needed / 2**30 for device in plan.devices}
    assert list(needed) == [("cuda:0", "cuda:1", "cuda:2"), ("cuda:3",), ("cuda:4", "cuda:5", "cuda:6", "cuda:7")]
    assert all(40 < gib < 79 for gib in needed.values())
    # Weights, gradients and two moments of 4.54 billion parameters in float32, on three devices.
    assert next(iter(needed.values())) > 16 * 4.54e9 / 3 / 2**30
    assert plan.seconds is not None
    assert 60 < plan.seconds < 600


def test_one_node_does_not_fit_devices_half_as_large(models: Path) -> None:
    plan = plan_run(_one_node(models, memory_gib=40), **TOKENS)
    with pytest.raises(ConfigError) as refused:
        require_fit(plan)
    needed = plan.devices[0].needed / 2**30
    # None of the three suffices alone.
    assert str(refused.value) == (
        f"the trainer needs {needed:.1f} GiB on each of 3 devices, which have 40.0 (placement.hardware.memory_gib); "
        "set placement.trainer.num_processes = 6 with as many devices, and placement.max_batch_tokens = 2048, and "
        "data.max_prompt_tokens = 6250"
    )


def test_what_a_refusal_names_makes_the_run_fit(models: Path) -> None:
    config = _one_node(models, memory_gib=60)
    (problem,) = plan_run(config, **TOKENS).problems
    assert problem.endswith("; set data.max_prompt_tokens = 12500, or optimizer.lora = { rank = 16 }")
    for section, setting in (("data", {"max_prompt_tokens": 12_500}), ("optimizer", {"lora": {"rank": 16}})):
        values = config.model_dump()
        values[section] |= setting
        require_fit(plan_run(RunConfig.model_validate(values), **TOKENS))


def test_a_teacher_on_one_device_has_no_room_for_its_cache(models: Path) -> None:
    values = _one_node(models).model_dump()
    values["placement"]["teacher_servers"] |= {"tensor_parallel": 1, "replicas": 4, "memory_share": 0.7}
    plan = plan_run(RunConfig.model_validate(values), **TOKENS)
    (problem,) = plan.problems
    assert problem.startswith("the teacher's server has 0.0 GiB left for its cache on each device, but one request of ")
    # 51 GiB of weights, 2 of libraries and 4 of a step leave room in 59 of 79, and not in 55.
    assert "set placement.teacher_servers.memory_share = 0.75, or " in problem
    assert "placement.teacher_servers.tensor_parallel = 2 with as many devices for each replica" in problem


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    laptop = PROJECT / "deployments" / "configs" / "laptop.toml"
    assert main(["--config", str(laptop), "--prompt-tokens", "40", "--crop-tokens", "20"]) == 0
    printed = capsys.readouterr().out
    for title in ("Models, parameters", "The plan of a round", "Memory of each device", "Store and images"):
        assert title in printed
    assert "453,744" in printed
    assert "prompt 40, crop 20, response 8" in printed


def test_what_is_unknown_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(PROJECT / "deployments" / "configs" / "laptop.toml")]) == 0
    printed = capsys.readouterr().out
    assert "prompt unknown, crop unknown" in printed
    assert "tokens and time are unknown, for the length of prompts is" in printed


def test_the_command_fails_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[placement.hardware]\nmemory_gib = 0.5\n")
    assert main(["--config", str(path), "--prompt-tokens", "40", "--crop-tokens", "20"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the trainer, the student's engine and the teacher's engine need ")
    assert "on cpu, which has 0.5 (placement.hardware.memory_gib)" in error
    assert main(["--config", str(tmp_path / "none.toml")]) == 1
    assert "there is no such file" in capsys.readouterr().err


class _Validation(Job):
    stage = "validate"


def _validated(tmp_path: Path) -> tuple[Store, ArtifactRef]:
    store = Store(str(tmp_path / "store"), tmp_path / "work")
    images = {"a": 100, "b": 300}

    def write(folder: Path) -> Outcome:
        samples = [
            Sample(id=name, image=ImageRef(uri=name, width=8, height=8, size_bytes=size), question="?")
            for name, size in images.items()
        ]
        facts = [
            RowFacts(row=1, id="a", question="?", student_tokens=40, positive_tokens=60),
            RowFacts(row=2, id="b", question="?", student_tokens=60, positive_tokens=90),
            RowFacts(row=3, id="bad", question="?", student_tokens=9000, positive_tokens=9999),
        ]
        write_rows(folder / SAMPLES, samples, Sample)
        write_rows(folder / FACTS, facts, RowFacts)
        return Outcome(summary={})

    return store, store.produce(_Validation(), write)


def test_figures_of_the_data_are_those_of_good_rows(tmp_path: Path) -> None:
    assert data_figures(*_validated(tmp_path)) == DataFigures(50.0, 60, 25.0, 200.0)


def test_a_run_shows_its_plan_and_stops_where_it_cannot_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validated = _validated(tmp_path)
    check_plan(RunConfig(), *validated)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 15
    assert "- cpu: needs " in printed
    with pytest.raises(ConfigError, match=r"which has 0\.5"):
        check_plan(RunConfig.model_validate({"placement": {"hardware": {"memory_gib": 0.5}}}), *validated)


def test_a_run_goes_on_where_a_models_sizes_are_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("fuyu").save_pretrained(tmp_path)
    check_plan(RunConfig.model_validate({"student": {"path": str(tmp_path)}}), *_validated(tmp_path))
    assert "there is no plan of this run: " in caplog.text
    assert capsys.readouterr().out == ""


def test_a_crop_of_unknown_size_is_as_large_as_the_prompt() -> None:
    plans = [plan_run(RunConfig(), prompt_tokens=40, crop_tokens=crop) for crop in (None, 40, 20)]
    tokens = [[stage.work.num_computed for stage in plan.stages if stage.work is not None] for plan in plans]
    assert tokens[0] == tokens[1] > tokens[2]
