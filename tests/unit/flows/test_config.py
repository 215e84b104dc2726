"""A wrong configuration is answered with what to do."""

import json
import re
from pathlib import Path

import pytest

from flows.config import PROJECT, RunConfig, load_config, main
from tasks.config import FileData
from vzero_core.config import GateConfig, NoGateConfig, PolicyGradientLoss, preset
from vzero_core.errors import ConfigError

ON_VLLM = "[student]\nengine = { kind = 'vllm', version = '0.32.0' }\n"
STUDENT_SERVERS = ON_VLLM + "[placement.student_servers]\n"


def toml(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


BENCHMARK = "[[benchmarks]]\nname = 'v'\nkind = 'vstar'\npath = 'v.tsv'\n"


def test_the_example_of_servers_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (PROJECT / "docs" / "VLLM.md").read_text(), re.DOTALL)
    config = load_config(toml(tmp_path, example))
    assert config.placement.student_servers.devices
    assert config.placement.teacher_servers.urls


def test_paths_of_benchmarks_count_from_the_files_folder(tmp_path: Path) -> None:
    [benchmark] = load_config(toml(tmp_path, BENCHMARK)).benchmarks
    assert benchmark.path == str(tmp_path / "v.tsv")
    assert benchmark.generation.max_new_tokens == 2048


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
        ("[evaluate.protocol]\nanswer_pattern = '('", "answer_pattern must be a regular expression"),
        ("[evaluate.protocol]\nanswer_pattern = 'x'", "answer_pattern must have one group"),
        ("[evaluate.protocol]\nkind = 'judge'", "evaluate.protocol: .*exact.*zwz.*vlmevalkit"),
        ("[evaluate.generation]\nseeds = [1, 1]\ntemperature = 1.0", "seeds must differ"),
        ("[evaluate.generation]\nseeds = [1, 2]", "seeds must be one where temperature is 0"),
        (BENCHMARK + "choice_template = '{question}'", "choice_template must contain {question} and {options} once"),
        (BENCHMARK + BENCHMARK, "benchmarks must have names of their own.* got v again"),
        (BENCHMARK.replace("'v'", "'held-out'"), "held-out is that of the data's own questions"),
        (BENCHMARK + "judge = { model = 'm', template = '{question}' }", r"template must contain {answer}, {response}"),
        (BENCHMARK + "protocol = 'zwz'", "benchmarks.0.protocol: must be a table of settings, such as { kind = ... }"),
        (BENCHMARK + "generation = 8", "benchmarks.0.generation: must be a table of settings, got 8"),
        (BENCHMARK.replace("[[benchmarks]]", "[benchmarks]"), r"benchmarks: must be a list, of tables \[\["),
        (BENCHMARK.replace("v.tsv", "s4://b/v.tsv"), "benchmarks.0.path: must be a path or one of file, s3,.* got s4:"),
        (BENCHMARK + "image_root = 'gs://b'", "benchmarks.0.image_root: must be a path or one of .* got gs://"),
        ("[data]\ncompare_with = ['gs://b']", "data.compare_with.0: must be a path or one of "),
        ("[data.source]\nkind = 'jsonl'\npath = 's4://a'", "data.source.path: must be a path or one of "),
        (
            BENCHMARK + "judge = { model = 'm' }\nprotocol = { kind = 'vlmevalkit' }",
            "judge has no effect with protocol vlmevalkit, which has none; remove it",
        ),
        (
            BENCHMARK + STUDENT_SERVERS + "max_model_len = 2048\n[data]\nmax_prompt_tokens = 100",
            r"benchmarks v: generation.max_new_tokens must be less than .*max_model_len 2048, .* got 2048; lower it",
        ),
        ("[rounds]\nprompts_per_round = 1", "mini_batches must be at most rounds.prompts_per_round, got 2 and 1"),
        ("[rounds]\nnum_shards = 33", "num_shards must be at most"),
        ("preset = 'paper'\n[gate]\nalpha = 2", "remove .gate. or the preset"),
        ("preset = 'mine'", "preset"),
        ("name = 'a b'", "name"),
        ("[student]\nengine = { version = '0.32.0' }", r'engine.version is no setting of .*; add kind = "vllm"$'),
        ("[data.source]\npath = 'a.jsonl'", r'path is no setting of kind "small_world"; add kind = "jsonl" or '),
        ("[gate]\nseed = 3", "gate.seed is no setting here; remove it"),
        (
            "[placement.student_servers]\nurls = ['http://host:8000']",
            r"placement.student_servers has no effect with student.engine.kind transformers; "
            r'set kind = "vllm" or remove it$',
        ),
        (
            ON_VLLM + "[placement.teacher_servers]\nmax_tokens_in_flight = 5000",
            "placement.teacher_servers has no effect with teacher.engine.kind transformers",
        ),
        (
            ON_VLLM + "[placement]\nteacher_device = 'cuda'\n[placement.student_servers]\ndevices = ['0']",
            "student_servers.devices must not hold placement.teacher_device, got cuda; choose another",
        ),
        (
            ON_VLLM + "[sampling]\ntemperature = 3",
            "sampling.temperature must be at most 2 on vLLM, got 3; lower it",
        ),
        ("seed = ", "must be TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toml(tmp_path, text))


def test_the_device_of_a_teacher_on_servers_is_not_used(tmp_path: Path) -> None:
    teacher = ON_VLLM.replace("student", "teacher")
    servers = "[placement]\nteacher_device = 'cuda'\n[placement.student_servers]\ndevices = ['0']"
    load_config(toml(tmp_path, ON_VLLM + teacher + servers))


@pytest.mark.parametrize(
    ("text", "room", "reason"),
    [
        # 1000 - 100 - 1: regions come with the data, and nobody responds to find them.
        ("", 899, "student_servers.max_model_len 1000 - sampling.max_new_tokens 100 - 1 that replay"),
        # Held-out questions are other prompts.
        ("evaluate.generation.max_new_tokens = 150\n", 899, "- sampling.max_new_tokens 100 - 1"),
        # The teacher's 900 - 200 - 1 is less than the student's 899.
        (
            "regions.proposer.kind = 'grid'\nteacher.engine = { kind = 'vllm', version = '0.32.0' }\n"
            "placement.teacher_servers.max_model_len = 900\n",
            699,
            "teacher_servers.max_model_len 900 - regions.max_new_tokens 200 - 1",
        ),
        (
            "teacher.engine = { kind = 'vllm', version = '0.32.0' }\nplacement.teacher_servers.max_model_len = 900\n",
            799,
            "teacher_servers.max_model_len 900 - sampling.max_new_tokens 100 - 1",
        ),
        # Of the student's servers nobody asks for regions.
        ("regions.proposer.kind = 'grid'\n", 899, "- sampling.max_new_tokens 100 - 1"),
    ],
)
def test_prompts_and_what_follows_them_fit_into_a_server(text: str, room: int, reason: str, tmp_path: Path) -> None:
    lengths = "sampling.max_new_tokens = 100\nregions.max_new_tokens = 200\n"
    servers = "student.engine = { kind = 'vllm', version = '0.32.0' }\nplacement.student_servers.max_model_len = 1000\n"
    everything = lengths + servers + text
    message = rf"data.max_prompt_tokens must be at most {room} \(.*{reason}.*\), got {{}}; set it to {room}$"
    with pytest.raises(ConfigError, match=message.format("none")):
        load_config(toml(tmp_path, everything))
    with pytest.raises(ConfigError, match=message.format(room + 1)):
        load_config(toml(tmp_path, f"{everything}data.max_prompt_tokens = {room + 1}"))
    assert load_config(toml(tmp_path, f"{everything}data.max_prompt_tokens = {room}")).data.max_prompt_tokens == room


def test_a_server_that_holds_no_prompt_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be at most 0 \(.* 9 - .* 8 - 1 .*\), got none; raise max_model_len$"):
        load_config(toml(tmp_path, STUDENT_SERVERS + "max_model_len = 9"))


@pytest.mark.parametrize(
    "urls",
    [
        "['http://user:hunter2@host:8000']",
        "['http://host', 'http://hunter2@host:8000']",
        "'http://user:hunter2@host:8000'",
        "['http://user:hunter2@[::1']",
        "['http://user:hunter2@host:8000/v1']",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(urls: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"urls must hold no user name and no password.*api_key_variable") as refused:
        load_config(toml(tmp_path, STUDENT_SERVERS + f"urls = {urls}"))
    assert "hunter2" not in f"{refused.value} {refused.value.__cause__}"


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


TRAINER = "[placement.trainer]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRAINER + 'num_processes = 2\ndevices = ["0"]', r"devices must be num_processes = 2 of them, got 1"),
        (TRAINER + 'num_processes = 2\ndevices = ["0", "0"]', r"devices must differ"),
        (TRAINER + 'devices = ["0"]', r"devices must be left out where one process trains; set student_device"),
        (TRAINER + "num_machines = 2", r"address must be given where there are several machines.* got None"),
        (TRAINER + 'address = "10.0.0.1:1"', r"address must be given where there are several machines, and only there"),
        (TRAINER + 'num_machines = 2\naddress = "http://10.0.0.1:1"', r"address must be HOST:PORT"),
        (TRAINER + 'sharding = "fsdp2"', r"sharding must be ddp where one process trains"),
        (
            TRAINER + 'num_processes = 2\ndevices = ["0", "1"]\n[placement.teacher_servers]\ndevices = ["1"]',
            r"devices of teacher_servers and trainer must be disjoint, both have \['1'\]",
        ),
        (
            "[placement]\nstudent_device = 'cuda'\n" + TRAINER + "num_processes = 2",
            r"trainer\.devices must list a GPU for each of several processes",
        ),
        ("[tracking]\ntrackers = ['excel']", r"tracking\.trackers"),
        ("[optimizer.lora]\nrank = 0", r"optimizer\.lora\.rank"),
    ],
)
def test_processes_and_devices_must_fit(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toml(tmp_path, text))
