"""Every shipped configuration is valid, fits the machine it is for, and holds the published hyper-parameters."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.published_models import save_published_models

from flows.config import PROJECT, RunConfig, load_config, resolve_paths
from flows.plan import plan_run
from tasks.adapters.planner import Plan, require_fit
from tasks.config import EMBEDDED
from vzero_core.config import preset
from vzero_core.errors import ConfigError

FOLDER = PROJECT / "deployments" / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.toml"))


@dataclass(frozen=True)
class Case:
    """What a configuration is planned with.

    Attributes:
        tokens: of a prompt, of what a crop adds, and of a response, in the mean.
        seconds: of a round, at least and at most.
        gib: that the fullest device needs, at least and at most.
        models: in place of models that the file leaves to the user.
        hardware: in place of asking this machine, where the file does not say what the machine is.
    """

    tokens: tuple[int, int, int]
    seconds: tuple[float, float]
    gib: tuple[float, float]
    models: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, float] = field(default_factory=dict)


SMALL_WORLD, FULL_IMAGES = (40, 20, 8), (2800, 700, 1000)
LAPTOP = {"memory_gib": 8.0, "tflops": 0.05, "bandwidth_gbs": 5.0}
PLANNED = {
    "laptop": Case(SMALL_WORLD, (0.05, 5), (0.5, 2), hardware=LAPTOP),
    "laptop-vllm": Case(SMALL_WORLD, (0.05, 5), (2, 6), hardware=LAPTOP),
    # A template for any models. Where none is named it runs on the CPU, as the small world does.
    "own-data": Case(
        FULL_IMAGES,
        (60, 3600),
        (1, 7),
        models={"student": f"{EMBEDDED}student", "teacher": f"{EMBEDDED}teacher"},
        hardware=LAPTOP,
    ),
    "single-gpu": Case(FULL_IMAGES, (100, 600), (60, 75)),
    "one-node": Case(FULL_IMAGES, (100, 300), (70, 78)),
    "multi-node": Case(FULL_IMAGES, (60, 300), (50, 65)),
}
ON_GPUS = ("single-gpu", "one-node", "multi-node")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published_models(tmp_path_factory.mktemp("models"))


def _load(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.toml")


def _plan(name: str, models: Path, **hardware: float) -> Plan:
    case = PLANNED[name]
    values = _load(name).model_dump()
    for role in ("student", "teacher"):
        path = case.models.get(role, values[role]["path"])
        values[role]["path"] = path if path.startswith(EMBEDDED) else str(models / Path(path).name)
    values["placement"]["hardware"] |= case.hardware | hardware
    prompt, crop, response = case.tokens
    config = RunConfig.model_validate(values)
    return plan_run(config, prompt_tokens=prompt, crop_tokens=crop, response_tokens=response)


def test_all_that_is_shipped_is_planned() -> None:
    assert sorted(PLANNED) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_it_fits_its_machine(name: str, models: Path) -> None:
    case, plan = PLANNED[name], _plan(name, models)
    require_fit(plan)
    fullest = max(device.needed for device in plan.devices) / 2**30
    assert case.gib[0] < fullest < case.gib[1]
    assert plan.seconds is not None
    assert case.seconds[0] < plan.seconds < case.seconds[1]


@pytest.mark.parametrize("name", ON_GPUS)
def test_it_does_not_fit_half_the_memory(name: str, models: Path) -> None:
    with pytest.raises(ConfigError, match=r"which ha(s|ve) 39\.5 \(placement\.hardware\.memory_gib\); "):
        require_fit(_plan(name, models, memory_gib=39.5))


def test_the_laptop_configuration_is_the_default() -> None:
    shipped, default = (config.model_dump() for config in (_load("laptop"), resolve_paths(RunConfig(), PROJECT)))
    for section, setting in (("store", "url"), ("publish", "url"), ("placement", "work_dir")):
        shipped[section][setting] = os.path.normpath(shipped[section][setting])
    assert shipped == default


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_commented_out_is_valid_too(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    path = tmp_path / "my.toml"
    path.write_text(re.sub(r"(?m)^# (\[+[\w.]+\]+$|\w+ = )", r"\1", text))
    load_config(path)


def test_own_data_show_how_to_publish_and_retrain(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(re.sub(r"(?m)^# (\[+[\w.]+\]+$|\w+ = )", r"\1", (FOLDER / "own-data.toml").read_text()))
    config = load_config(path)
    assert config.publish.hub == "OWNER/NAME"
    assert config.retrain.promotion is not None
    assert config.retrain.promotion.path == str(tmp_path / "promotion.jsonl")
    assert [each.name for each in config.benchmarks] == ["vstar"]


# Section 1 of the method's description, written out: a step is 32 prompts x 8 rollouts, in 2 mini-batches of 16, once.
STEP = {
    "sampling.num_responses": 8,
    "sampling.temperature": 1.0,
    "sampling.max_new_tokens": 2048,
    "rounds.prompts_per_round": 32,
    "rounds.num_rounds": 60,
    "optimizer.mini_batches": 2,
    "optimizer.epochs": 1,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 0.01,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.warmup_updates": 0,
    "optimizer.frozen": (),
    "optimizer.importance_cap": None,
    "prompt.enable_thinking": False,
    "replay.target": "positive",
    "views.positive.min_pixels": 65_536,
    "views.negative.downsample": 2,
    "gate.kind": "contrastive",
    "gate.alpha": 1.0,
    "gate.w_min": 0.0,
    "gate.w_max": 2.0,
    "gate.eps": 1e-6,
    "loss.kind": "policy_gradient",
    "loss.aggregation": "sequence_mean",
}
ALL_WEIGHTS = {"optimizer.learning_rate": 1e-6, "optimizer.lora": None, "data.max_prompt_tokens": 25_000}
# One GPU has no room for more; what it changes is said in the file.
ADAPTERS = {"optimizer.learning_rate": 1e-5, "optimizer.lora.rank": 16, "data.max_prompt_tokens": 12_500}


@pytest.mark.parametrize(
    ("name", "published"),
    [("one-node", STEP | ALL_WEIGHTS), ("multi-node", STEP | ALL_WEIGHTS), ("single-gpu", STEP | ADAPTERS)],
)
def test_hyper_parameters_are_the_published_ones(name: str, published: dict[str, Any]) -> None:
    config = _load(name)

    def value(setting: str) -> Any:
        found: Any = config
        for part in setting.split("."):
            found = getattr(found, part)
        return found

    assert {setting: value(setting) for setting in published} == published
    paper = preset("paper")
    assert (config.gate, config.loss) == (paper.gate, paper.loss)
    assert Path(config.student.path).name == "Qwen3.5-4B"
    assert Path(config.teacher.path).name == ("Qwen3.5-9B" if name == "single-gpu" else "Qwen3.5-27B")
