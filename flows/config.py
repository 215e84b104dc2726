"""The whole configuration of a run. `python -m flows.config my.toml` prints it as parameters of a deployment."""

import difflib
import sys
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from tasks.config import (
    EMBEDDED,
    CheckpointConfig,
    DataConfig,
    GivenRegions,
    InProcessEngine,
    ModelConfig,
    OptimizerConfig,
    OutputsConfig,
    PlacementConfig,
    PromptConfig,
    PublishConfig,
    RegionsConfig,
    ReplayConfig,
    RoundsConfig,
    SamplingConfig,
    ServersConfig,
    Settings,
    StoreConfig,
    TrackingConfig,
    VLLMEngine,
)
from tasks.evaluation_config import HELD_OUT, BenchmarkConfig, EvaluateConfig, RetrainConfig, SelectionConfig
from vzero_core.config import (
    ForwardKLTopKLoss,
    Gate,
    GateConfig,
    Loss,
    NegativeCropConfig,
    PositiveCropConfig,
    Preset,
    ViewConfig,
    preset,
)
from vzero_core.errors import ConfigError

PROJECT = Path(__file__).parents[1]
MAX_VLLM_TEMPERATURE = 2.0


class RunConfig(Settings):
    """One run of the pipeline. The default is the laptop's: the small world, on CPU, in minutes.

    A setting that is left out has the laptop's value, also inside a section that is given in part.
    """

    name: str = Field(default="small-world", description="How runs are called on the dashboard.", pattern=r"^[\w.-]+$")
    seed: int = Field(default=0, ge=0, description="Every random choice follows from it.")
    data: DataConfig = Field(default=DataConfig(), description="What to train on and what to measure on.")
    views: ViewConfig = Field(
        # A crop of the small world is a 32 x 32 window of its 128 x 128 detail image, shown as it is.
        default=ViewConfig(
            positive=PositiveCropConfig(min_side_px=32, min_pixels=1024), negative=NegativeCropConfig(downsample=1)
        ),
        description="How the relevant and the irrelevant crop are cut.",
    )
    regions: RegionsConfig = Field(default=RegionsConfig(), description="Where regions come from.")
    student: ModelConfig = Field(default=ModelConfig(path=f"{EMBEDDED}student"), description="The model that learns.")
    teacher: ModelConfig = Field(default=ModelConfig(path=f"{EMBEDDED}teacher"), description="The model that replays.")
    prompt: PromptConfig = Field(default=PromptConfig(), description="How a question becomes a prompt.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="How the student responds.")
    replay: ReplayConfig = Field(default=ReplayConfig(), description="What the teacher replays.")
    preset: Preset | None = Field(
        default=None, description="A published combination of gate, loss and aggregation; excludes [gate] and [loss]."
    )
    gate: Gate = Field(default=GateConfig(min_spread=1e-3), description="How responses are weighted.")
    loss: Loss = Field(default=ForwardKLTopKLoss(k=10), description="What pulls the student to the teacher.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="How the student is updated.")
    rounds: RoundsConfig = Field(default=RoundsConfig(), description="How many rounds, and how large.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="When the full state is stored.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="How accuracy is measured.")
    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        default=(), description="What else the student is measured on, before training and after."
    )
    selection: SelectionConfig = Field(default=SelectionConfig(), description="How a checkpoint is chosen.")
    store: StoreConfig = Field(default=StoreConfig(), description="Where artefacts live.")
    publish: PublishConfig = Field(
        default=PublishConfig(url=".vzero/published"), description="Where chosen students are published."
    )
    retrain: RetrainConfig = Field(default=RetrainConfig(), description="How new samples are learned.")
    outputs: OutputsConfig = Field(default=OutputsConfig(), description="Versions of the outputs in lakeFS.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Where figures of the rounds are sent.")
    placement: PlacementConfig = Field(default=PlacementConfig(), description="Devices and scratch; changes no result.")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("preset") is not None:
            values = _with_preset(values)
        defaults = {
            name: info.default for name, info in cls.model_fields.items() if isinstance(info.default, BaseModel)
        }
        return {name: _merged(defaults.get(name), value) for name, value in values.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.optimizer.mini_batches > self.rounds.prompts_per_round:
            raise ValueError(
                f"optimizer.mini_batches must be at most rounds.prompts_per_round, got {self.optimizer.mini_batches} "
                f"and {self.rounds.prompts_per_round}"
            )
        if self.rounds.num_shards > self.rounds.prompts_per_round:
            raise ValueError(
                f"rounds.num_shards must be at most rounds.prompts_per_round, got {self.rounds.num_shards} "
                f"and {self.rounds.prompts_per_round}"
            )
        if self.optimizer.importance_cap is not None and isinstance(self.loss, ForwardKLTopKLoss):
            raise ValueError(
                "optimizer.importance_cap must be left out with loss.kind forward_kl_topk, which does not depend on "
                "the sampled token; choose another loss or no cap"
            )
        if isinstance(self.student.engine, VLLMEngine) and self.sampling.temperature > MAX_VLLM_TEMPERATURE:
            raise ValueError(
                f"sampling.temperature must be at most {MAX_VLLM_TEMPERATURE:g} on vLLM, "
                f"got {self.sampling.temperature:g}; lower it"
            )
        return self

    @property
    def measured(self) -> tuple[BenchmarkConfig, ...]:
        """What the student is measured on beside the data's own questions: benchmarks, and the promotion split."""
        return (*self.benchmarks, *((self.retrain.promotion,) if self.retrain.promotion is not None else ()))

    @model_validator(mode="after")
    def _published(self) -> Self:
        for name, given in (("outputs.publish", self.outputs.publish), ("publish.hub", self.publish.hub)):
            if given and self.publish.url is None:
                raise ValueError(f"{name} needs publish.url, where the champion is named, got none; set it")
        return self

    @model_validator(mode="after")
    def _benchmarks_fit(self) -> Self:
        names = [benchmark.name for benchmark in self.measured]
        if repeated := sorted({name for name in names if [HELD_OUT, *names].count(name) > 1}):
            raise ValueError(
                f"benchmarks must have names of their own, and {HELD_OUT} is that of the data's own questions, got "
                f"{', '.join(repeated)} again; rename it"
            )
        return self

    @model_validator(mode="after")
    def _servers_fit(self) -> Self:
        placement = self.placement
        rooms = []
        for role, model, servers in (
            ("student", self.student, placement.student_servers),
            ("teacher", self.teacher, placement.teacher_servers),
        ):
            if isinstance(model.engine, InProcessEngine) and servers != ServersConfig():
                raise ValueError(
                    f"placement.{role}_servers has no effect with {role}.engine.kind {model.engine.kind}; "
                    'set kind = "vllm" or remove it'
                )
            if servers.max_model_len is not None:
                setting, new_tokens = self._longest_generation(role)
                reason = (
                    f"placement.{role}_servers.max_model_len {servers.max_model_len} - {setting} {new_tokens} - 1 that "
                    "replay generates"
                )
                rooms.append((servers.max_model_len - new_tokens - 1, reason))
        longest = placement.student_servers.max_model_len
        named = {f"benchmarks {each.name}": each.generation for each in self.measured}
        for name, generation in {"evaluate": self.evaluate.generation, **named}.items():
            if longest is not None and generation.max_new_tokens >= longest:
                raise ValueError(
                    f"{name}: generation.max_new_tokens must be less than placement.student_servers.max_model_len "
                    f"{longest}, which the prompt has to fit in too, got {generation.max_new_tokens}; lower it"
                )
        room, reason = min(rooms, default=(None, ""))
        given = self.data.max_prompt_tokens
        if room is not None and (given is None or given > room):
            raise ValueError(
                f"data.max_prompt_tokens must be at most {room} ({reason}), got {'none' if given is None else given}; "
                + (f"set it to {room}" if room > 0 else "raise max_model_len")
            )
        if isinstance(self.teacher.engine, InProcessEngine) and placement.student_servers.use(placement.teacher_device):
            raise ValueError(
                f"placement.student_servers.devices must not hold placement.teacher_device, got "
                f"{placement.teacher_device}; choose another"
            )
        return self

    def _longest_generation(self, role: str) -> tuple[str, int]:
        """Give the setting that lets a model write most after a training prompt, and how many tokens."""
        lengths = {"sampling.max_new_tokens": self.sampling.max_new_tokens}
        if role == "teacher" and not isinstance(self.regions.proposer, GivenRegions):
            lengths["regions.max_new_tokens"] = self.regions.max_new_tokens
        return max(lengths.items(), key=lambda length: length[1])


LAPTOP = RunConfig()


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    objective = preset(values["preset"])
    for name, fixed in (("gate", objective.gate), ("loss", objective.loss)):
        # A validated configuration that was written out holds all three, and must read back as it was.
        if values.get(name) not in (None, fixed, fixed.model_dump(), fixed.model_dump(mode="json")):
            raise ValueError(f"preset fixes [gate] and [loss] together; remove [{name}] or the preset")
    return {**values, "gate": objective.gate, "loss": objective.loss}


def _merged(default: Any, given: Any) -> Any:
    """Fill what a section leaves out from the default section, unless it is of another kind."""
    if isinstance(default, BaseModel):
        default = default.model_dump()
    if not isinstance(default, dict) or not isinstance(given, dict):
        return given
    if given.get("kind", default.get("kind")) != default.get("kind"):
        return given
    return {**default, **{name: _merged(default.get(name), value) for name, value in given.items()}}


def load_config(path: Path) -> RunConfig:
    """Read a run's configuration from TOML; relative paths in it count from its folder.

    Raises:
        ConfigError: the file is missing, is no TOML, or a setting is wrong; every wrong setting is named.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"configuration must be a TOML file, but there is no such file: {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration must be TOML, but {path} cannot be read: {error}") from error
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error)}") from error
    return resolve_paths(config, path.resolve().parent)


def resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Make the relative paths of a configuration absolute."""
    values = config.model_dump()
    for section, *names in (
        ("student", "path"),
        ("teacher", "path"),
        ("store", "url"),
        ("publish", "url"),
        ("placement", "work_dir"),
    ):
        for name in names:
            if values[section][name] is not None:
                values[section][name] = _absolute(values[section][name], folder)
    source = values["data"]["source"]
    for name in ("path", "image_root", "evaluation_path"):
        if source.get(name) is not None:
            source[name] = _absolute(source[name], folder)
    promotion = values["retrain"]["promotion"]
    for benchmark in (*values["benchmarks"], *([promotion] if promotion is not None else [])):
        for name in ("path", "image_root"):
            if benchmark[name] is not None:
                benchmark[name] = _absolute(benchmark[name], folder)
    values["data"]["compare_with"] = [_absolute(path, folder) for path in values["data"]["compare_with"]]
    return RunConfig.model_validate(values)


def _absolute(path: str, folder: Path) -> str:
    if "://" in path or path.startswith(EMBEDDED):
        return path
    return str(folder / Path(path).expanduser())


_PLAIN = {
    "model_type": "must be a table of settings",
    "model_attributes_type": "must be a table of settings, such as { kind = ... }",
    "tuple_type": "must be a list, of tables [[...]]",
}
"""What pydantic says in the words of Python, in those of TOML, by the type of the problem."""


def explain(error: ValidationError) -> str:
    """Say what is wrong with each setting, a line each; an unknown one is answered with the nearest known name."""
    lines = []
    unions = _unions()
    branches = {kind for union in unions for kind in union}
    for problem in error.errors():
        # Pydantic names the branch of a union, which is not part of what a user wrote.
        where = [str(part) for part in problem["loc"] if part not in branches]
        name = ".".join(where) or "configuration"
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {name} is no setting{_instead(problem['loc'], unions)}")
        else:
            message = _PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            lines.append(f"  {name}: {message[0].lower()}{message[1:]}{got if 'got' not in message else ''}")
    return "\n".join(lines)


def _instead(where: tuple[int | str, ...], unions: list[dict[str, set[str]]]) -> str:
    """Say what to do about a setting that is not known where it stands."""
    name, branch = str(where[-1]), str(where[-2]) if len(where) > 1 else ""
    kinds = {kind for union in unions if branch in union for kind, names in union.items() if name in names}
    if kinds:
        return f' of kind "{branch}"; add kind = ' + " or ".join(f'"{kind}"' for kind in sorted(kinds))
    known = _known_names()
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near and name not in known else " here; remove it"


def _known_names() -> set[str]:
    schema = RunConfig.model_json_schema()
    return {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}


def _unions() -> list[dict[str, set[str]]]:
    """Give every choice by `kind`: the settings of each kind."""
    schema = RunConfig.model_json_schema()
    found: list[dict[str, set[str]]] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if kinds := part.get("discriminator", {}).get("mapping"):
                found.append(
                    {kind: set(schema["$defs"][ref.rpartition("/")[2]]["properties"]) for kind, ref in kinds.items()}
                )
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    walk(schema)
    return found


def main(arguments: list[str]) -> int:
    """Print a TOML configuration as the parameters of a flow run."""
    if len(arguments) != 1:
        print("usage: python -m flows.config my.toml", file=sys.stderr)
        return 2
    try:
        config = load_config(Path(arguments[0]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f'{{"config": {config.model_dump_json()}}}')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
