"""Every shipped configuration is valid; a wrong one is answered with what to do."""

import json
from pathlib import Path

import pytest

from flows.config import PROJECT, RunConfig, load_config, main
from tasks.config import FileData
from vzero_core.config import GateConfig, NoGateConfig, PolicyGradientLoss, preset
from vzero_core.errors import ConfigError

CONFIGS = sorted((PROJECT / "deployments" / "configs").glob("*.toml"))


def toml(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path)


def test_the_laptop_configuration_is_the_default() -> None:
    shipped = load_config(PROJECT / "deployments" / "configs" / "laptop.toml")
    local = {"store", "placement"}  # where they point depends on the folder of the file
    assert shipped.model_dump(exclude=local) == RunConfig().model_dump(exclude=local)


def test_every_setting_is_described() -> None:
    schema = RunConfig.model_json_schema()
    for name, part in schema["$defs"].items():
        for field, info in part["properties"].items():
            assert info.get("description") or field == "kind", f"{name}.{field}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rouns = 3", r"rouns is no setting; did you mean rounds\?"),
        ("[gate]\nalpa = 3", r"gate.alpa is no setting; did you mean alpha\?"),
        ("[gate]\nalpha = -1", "gate.alpha: input should be greater than or equal to 0, got -1"),
        ("[gate]\nkind = 'nice'", "gate: .*contrastive.*prefix_trust.*off"),
        ("[gate]\nw_min = 1.5", "gate.w_min"),
        ("[loss]\nkind = 'policy_gradient'\nestimator = 'k2'", "loss.estimator is no setting"),
        ("[data.source]\nkind = 'jsonl'", "data.source.path: field required"),
        ("[prompt]\ntemplate = 'no question'", "prompt.template: template must contain {question} once"),
        ("[evaluate]\nanswer_pattern = '('", "answer_pattern must be a regular expression"),
        ("[evaluate]\nanswer_pattern = 'x'", "answer_pattern must have one group"),
        ("[rounds]\nprompts_per_round = 1", "mini_batches must be at most rounds.prompts_per_round, got 2 and 1"),
        ("[rounds]\nnum_shards = 33", "num_shards must be at most"),
        ("preset = 'paper'\n[gate]\nalpha = 2", "remove .gate. or the preset"),
        ("preset = 'mine'", "preset"),
        ("name = 'a b'", "name"),
        ("seed = ", "must be TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toml(tmp_path, text))


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)gate.alpha.*rouns"):
        load_config(toml(tmp_path, "rouns = 1\n[gate]\nalpha = -1"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "no.toml")


def test_a_preset_fixes_gate_and_loss(tmp_path: Path) -> None:
    config = load_config(toml(tmp_path, "preset = 'release'"))
    assert (config.gate, config.loss) == (preset("release").gate, preset("release").loss)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    paper = load_config(toml(tmp_path, "preset = 'paper'"))
    assert (paper.gate, paper.loss) == (GateConfig(), PolicyGradientLoss())


def test_a_section_given_in_part_keeps_the_rest(tmp_path: Path) -> None:
    config = load_config(toml(tmp_path, "[gate]\nalpha = 0.5\n[views.negative]\ndownsample = 2"))
    assert config.gate == GateConfig(alpha=0.5, min_spread=1e-3)
    assert config.views.positive == RunConfig().views.positive
    assert config.views.negative.downsample == 2


def test_a_variant_of_the_gate_is_a_setting(tmp_path: Path) -> None:
    assert load_config(toml(tmp_path, "[gate]\nkind = 'off'")).gate == NoGateConfig()


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    text = "[data.source]\nkind = 'jsonl'\npath = 'a.jsonl'\n[student]\npath = 'm'\n[store]\nurl = 's3://bucket/x'"
    config = load_config(toml(tmp_path, text))
    assert isinstance(config.data.source, FileData)
    assert config.data.source.path == str(tmp_path / "a.jsonl")
    assert config.student.path == str(tmp_path / "m")
    assert config.teacher.path == "embedded:teacher"
    assert config.store.url == "s3://bucket/x"


def test_the_command_prints_parameters_of_a_flow_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toml(tmp_path, "seed = 3")
    assert main([str(path)]) == 0
    parameters = json.loads(capsys.readouterr().out)
    assert RunConfig.model_validate(parameters["config"]) == load_config(path)
    assert main([str(toml(tmp_path, "sed = 3"))]) == 1
    assert "did you mean seed?" in capsys.readouterr().err
    assert main([]) == 2
