"""Settings of the stages. `flows.config.RunConfig` puts them together; each stage sees its own slice only."""

import re
from itertools import combinations, pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
    field_validator,
    model_validator,
)

from vzero_core.config import Target

EMBEDDED = "embedded:"
"""Prefix of a model path that names one of the small world's models."""

URL_SCHEMES = ("file", "s3", "lakefs", "http", "https", "memory")
"""Of data and images; fsspec knows many more, some of which need packages of their own or run other programs."""

_AS_IT_IS = "leave it out: the run needs it as it is"
FLAGS_OF_THE_RUN = {
    "--model": "set the model's path",
    "--host": "leave it out: the run's servers listen on 127.0.0.1",
    "--port": "leave it out: a free one is taken",
    "--api-key": "leave it out: a key is made for the run",
    "--served-model-name": "set served_name",
    "--dtype": "set the model's dtype",
    "--quantization": "set quantization of the model's engine",
    "-q": "set quantization of the model's engine",
    "--max-model-len": "set max_model_len",
    "--tensor-parallel-size": "set tensor_parallel",
    "-tp": "set tensor_parallel",
    "--data-parallel-size": "set data_parallel",
    "-dp": "set data_parallel",
    "--gpu-memory-utilization": "set memory_share",
    "--device-memory-utilization": "set memory_share",
    "--config": "write what it holds into flags",
    "--limit-mm-per-prompt": _AS_IT_IS,
    "--max-logprobs": _AS_IT_IS,
    "--logprobs-mode": _AS_IT_IS,
    "--generation-config": _AS_IT_IS,
    "--enable-scale-out": _AS_IT_IS,
    "--enable-prompt-tokens-details": _AS_IT_IS,
}
"""Flags of a vLLM server that are not for users to set, and what to do instead."""


class Settings(BaseModel):
    """Base of all settings: immutable, and strict about unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        # What was given may be an address with a password in it.
        hide_input_in_errors=True,
        # In the dashboard's form a setting is called as in the configuration.
        field_title_generator=lambda name, _: name,
    )


def _known_scheme(path: str) -> str:
    scheme, is_url, _ = path.partition("://")
    if is_url and scheme not in URL_SCHEMES:
        raise ValueError(f"must be a path or one of {', '.join(URL_SCHEMES)} URLs, got {scheme}://; correct it")
    return path


Location = Annotated[str, AfterValidator(_known_scheme)]
"""A path or a URL."""


class SmallWorldData(Settings):
    """The embedded small world: scenes drawn from a seed, no download."""

    kind: Literal["small_world"] = "small_world"
    num_prompts: int = Field(default=1984, ge=1, description="Training prompts, those set aside included.")
    num_evaluation: int = Field(default=1000, ge=1, description="Held-out questions, always the same ones.")
    seed: int = Field(default=0, ge=0, description="Which training scenes are drawn.")


class FileData(Settings):
    """Your own data, in the project's format or another one; answers in it are dropped at the door."""

    kind: Literal[
        "jsonl", "parquet", "zwz_rl_vqa", "visual_cot", "viscot_363k", "treevgr_rl_37k", "vstar_seal", "vzero_release"
    ] = Field(description="Format of the rows (docs/DATA.md). jsonl and parquet: id, image, question, region.")
    path: Location = Field(description="The file, or a URL; with several files of one format, a folder.")
    image_root: Location | None = Field(
        default=None, description="Folder or URL that relative image paths count from; none: the file's folder."
    )
    box_format: Literal["xyxy", "xywh"] | None = Field(default=None, description="None: as the format has it.")
    box_unit: Literal["pixels", "fraction", "per_mille"] | None = Field(
        default=None,
        description="Pixels, or parts of the image's sides: 0 to 1, 0 to 1000. None: as the format has it.",
    )
    license: str | None = Field(default=None, description="Licence of rows that name none.")
    evaluation_path: Location | None = Field(
        default=None, description="JSONL with id, image, question, answer; none: no accuracy is measured."
    )


class DataConfig(Settings):
    """What to train on and what to measure on."""

    source: Annotated[SmallWorldData | FileData, Field(discriminator="kind")] = Field(
        default=SmallWorldData(), description="The small world, or your own files."
    )
    images: Literal["decode", "header"] = Field(
        default="decode",
        description="decode: every image is decoded, hashed and compared; header: only its size is read, in a minute.",
    )
    max_image_pixels: int = Field(
        default=100_000_000, ge=1, description="Larger images are refused before they are decoded."
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="Above this share of bad rows the run stops; below, they are set aside."
    )
    max_region_share: float = Field(
        default=1.0, gt=0, le=1, description="Regions that cover more of their image than this are set aside."
    )
    max_hash_distance: int = Field(
        default=4,
        ge=0,
        le=16,
        description="Images whose perceptual hashes differ in at most this many of 64 bits count as the same.",
    )
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Longer prompts are set aside; none: the models' contexts less the response."
    )
    compare_with: tuple[Location, ...] = Field(
        default=(),
        description="JSONL files of images and questions that no training image may come from: your benchmarks.",
    )


class InProcessEngine(Settings):
    """transformers, in the process of the run."""

    kind: Literal["transformers"] = Field(default="transformers", description="The engine in the box.")


class VLLMEngine(Settings):
    """vLLM servers (docs/VLLM.md); where they are says `placement`."""

    kind: Literal["vllm"] = Field(default="vllm", description="vLLM servers.")
    version: str = Field(description="Version of vLLM, such as 0.32.0; a server of another one is refused.")
    quantization: str | None = Field(default=None, description="vLLM's --quantization; none: as the model says.")


class ModelConfig(Settings):
    """A Hugging Face model folder, and what samples from it or replays with it."""

    path: str = Field(description="Folder with config.json, safetensors, tokenizer and image processor.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Arithmetic; in bfloat16, training keeps weights and moments in float32."
    )
    engine: Annotated[InProcessEngine | VLLMEngine, Field(discriminator="kind")] = Field(
        default=InProcessEngine(), description="What samples (student) and replays (teacher); training is in-process."
    )


class PromptConfig(Settings):
    """How a question becomes a prompt; the same text for the student and for the teacher under every view."""

    system: str = Field(default="", description="System message; empty: none.")
    template: str = Field(default="{question}", description="User text; {question} is replaced.")
    chat_template_args: dict[str, Any] = Field(default={}, description="Further arguments of the chat template.")
    enable_thinking: bool = Field(default=False, description="Thinking mode, where the chat template knows it.")

    @field_validator("template")
    @classmethod
    def _has_question(cls, template: str) -> str:
        if template.count("{question}") != 1:
            raise ValueError(f"template must contain {{question}} once, got {template!r}; add it")
        return template


class SamplingConfig(Settings):
    """How the student responds."""

    num_responses: int = Field(default=8, ge=1, description="Responses per prompt (G).")
    temperature: float = Field(default=1.0, gt=0, description="1: the student's own distribution.")
    max_new_tokens: int = Field(default=8, ge=1, description="Longer responses are cut, kept and counted.")


class ReplayConfig(Settings):
    """What the teacher replays."""

    target: Target = Field(
        default="positive",
        description="View distilled from; 'none' is the teacher without a crop, the baseline of every comparison.",
    )


class LoRAConfig(Settings):
    """Low-rank adapters in the place of all weights (docs/TRAINING.md); served are the merged weights."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=32.0, gt=0, description="An adapter's product is scaled by alpha / rank.")
    target: str = Field(
        default="all-linear",
        description="Modules with adapters: all-linear, or a regular expression that fits their whole names.",
    )


class OptimizerConfig(Settings):
    """AdamW and what one round does with it."""

    learning_rate: float = Field(default=3e-4, gt=0, description="Constant after the warm-up.")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="Decay of AdamW's two moments.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled, times the learning rate.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient's norm is clipped here.")
    warmup_updates: int = Field(default=10, ge=0, description="Updates over which the learning rate rises linearly.")
    mini_batches: int = Field(default=2, ge=1, description="Parts of a round; one update each.")
    epochs: int = Field(default=1, ge=1, description="Passes over a round.")
    frozen: tuple[str, ...] = Field(
        default=(), description="Parameters that stay fixed, by shell pattern: 'model.visual.*'."
    )
    lora: LoRAConfig | None = Field(default=None, description="Adapters that learn, none: all weights learn.")
    importance_cap: float | None = Field(
        default=None,
        ge=1,
        description="Token weights: trainer's over sampler's probability, at most this; 2 is usual; none: no weights.",
    )


class RoundsConfig(Settings):
    """How many rounds, and how large."""

    num_rounds: int = Field(default=60, ge=1, description="More of them extend a run that is there.")
    prompts_per_round: int = Field(
        default=32, ge=1, description="Fresh prompts; passes over the data follow one another."
    )
    num_shards: int = Field(default=1, ge=1, description="Parts of a round that are sampled and replayed one by one.")


class CheckpointConfig(Settings):
    """How often a full training state is stored."""

    every: int = Field(default=1, ge=1, description="Rounds between full training states.")


class StoreConfig(Settings):
    """Where artefacts live."""

    url: str = Field(default=".vzero/store", description="Folder, or s3://bucket/prefix (docs/STORE.md).")
    cache_gib: float = Field(
        default=10.0, ge=0, description="Room on local disk for what was read from a bucket, in GiB."
    )
    prefect_block: str | None = Field(
        default=None,
        description="Prefect block remote-file-system/NAME with the bucket's settings; none: from the environment.",
    )
    web_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Address at which a browser finds the store's files, for links on the dashboard; none: paths.",
    )


class OutputsConfig(Settings):
    """Versions of a run's outputs in lakeFS (docs/LAKEFS.md); without a repository the store alone keeps them."""

    repository: str | None = Field(default=None, description="lakeFS repository for model, report and samples.")
    base: str = Field(default="main", description="Branch that the run's branch starts from.")
    publish: bool = Field(
        default=False,
        description="Where the student becomes champion: merge the run's branch into the base and tag it champion.",
    )


class PublishConfig(Settings):
    """Where chosen students are published, and one of them is the champion (docs/PUBLISHING.md)."""

    url: Location | None = Field(
        default=None,
        description="Folder, or s3://bucket/prefix, of versions and history; none: nothing is published.",
    )
    hub: str | None = Field(
        default=None,
        description="Repository OWNER/NAME on the Hugging Face hub that the champion is uploaded to; none: none.",
        pattern=r"^[\w.-]+/[\w.-]+$",
    )
    license: str | None = Field(default=None, description="Licence of the weights, as the hub names it.")


class ServersConfig(Settings):
    """Where the vLLM servers of one model are: running already, or started and stopped by the run."""

    urls: tuple[str, ...] = Field(
        default=(), description="Servers that run already, http://HOST:PORT; none: the run starts its own."
    )
    served_name: str = Field(default="vzero", description="Name under which the servers serve the model.")
    api_key_variable: str | None = Field(
        default=None, description="Environment variable with the servers' API key; none: they ask for none."
    )
    command: tuple[str, ...] = Field(
        default=("python3", "-m", "vllm.entrypoints.openai.api_server"),
        min_length=1,
        description="What starts a server; its flags are added.",
    )
    flags: tuple[str, ...] = Field(default=(), description="Further flags, beside those that the run sets.")
    environment: dict[str, str] = Field(default={}, description="Further environment variables; no secrets.")
    devices: tuple[str, ...] = Field(default=(), description="GPUs of one server after the other; none: the CPU.")
    replicas: int = Field(default=1, ge=1, description="How many servers are started.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share the weights.")
    data_parallel: int = Field(default=1, ge=1, description="Copies of the model behind one server.")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory that a server takes.")
    max_model_len: int | None = Field(
        default=None, ge=1, description="Tokens of prompt and response together; none: as the model says."
    )
    max_tokens_in_flight: int = Field(
        default=65_536, ge=1, description="Tokens of the requests that one server is given at a time."
    )
    start_timeout: float = Field(default=900.0, gt=0, description="Seconds until a server must answer.")
    request_timeout: float = Field(default=600.0, gt=0, description="Seconds after which a request counts as lost.")
    read_prefix_cache: bool = Field(
        default=False,
        description="Replay reads the prompt from the server's cache: faster, not a documented use (docs/VLLM.md).",
    )

    @field_validator("urls", mode="before")
    @classmethod
    def _hold_no_password(cls, urls: Any) -> Any:
        if "@" in str(urls):
            raise ValueError(
                "urls must hold no user name and no password, got an address with @; put the servers' key into an "
                "environment variable and name that in api_key_variable"
            )
        return urls

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        addresses = tuple(_address(url) for url in urls)
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"urls must differ, got {urls}; name each server once")
        return addresses

    @field_validator("flags")
    @classmethod
    def _leave_the_runs_alone(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for given in flags:
            # vLLM takes underscores, --flag=value, --flag.key, --no-flag and the beginning of a name as well.
            name = re.split("[=.]", given)[0].replace("_", "-").replace("--no-", "--", 1)
            for flag, instead in FLAGS_OF_THE_RUN.items():
                if name.startswith("-") and flag.startswith(name):
                    raise ValueError(f"flags must not set {flag}, got {given!r}; {instead}")
        return flags

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        on_gpus = ("tensor_parallel", "data_parallel", "memory_share")
        of_our_own = ("command", "flags", "environment", "devices", "replicas", *on_gpus, "max_model_len")
        if self.urls and (idle := self._changed(of_our_own)):
            raise ValueError(
                f"{', '.join(idle)} must be left out where urls are given, whose servers run already; remove it"
            )
        if not self.urls and not self.devices and (idle := self._changed(on_gpus)):
            raise ValueError(
                f"{', '.join(idle)} must be left out where no devices are given, for servers on the CPU; list the GPUs "
                "in devices, or remove it"
            )
        if self.api_key_variable is not None and not self.urls:
            raise ValueError(
                "api_key_variable must be left out where no urls are given: servers that the run starts have a key "
                "that is made for it; remove it"
            )
        return self

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="after")
    def _devices_suffice(self) -> Self:
        needed = self.replicas * self.tensor_parallel * self.data_parallel
        if self.devices and len(self.devices) != needed:
            raise ValueError(
                f"devices must be replicas x tensor_parallel x data_parallel = {needed} of them, "
                f"got {len(self.devices)}; list as many"
            )
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices must differ, got {self.devices}; name each once")
        return self

    def use(self, device: str) -> bool:
        """Tell whether the run's servers compute on a device.

        Args:
            device: as torch names it: cpu, cuda, cuda:1.
        """
        kind, _, number = device.partition(":")
        return kind == "cuda" and (number or "0") in self.devices


def _address(url: str) -> str:
    """Give an address in its one usual form, without a slash at its end."""
    try:
        parts = HttpUrl(url)
    except ValidationError:
        parts = None
    if parts is None or (parts.path, parts.query, parts.fragment) != ("/", None, None):
        raise ValueError(f"urls must be of the form http://HOST:PORT, got {url!r}; leave out what follows the port")
    return str(parts).rstrip("/")


class TrainerConfig(Settings):
    """How many processes train together, and how they share the student (docs/TRAINING.md)."""

    num_processes: int = Field(
        default=1, ge=1, description="On this machine; more than one in all are started by accelerate launch."
    )
    num_machines: int = Field(default=1, ge=1, description="The others join this one, with as many processes each.")
    address: str | None = Field(
        default=None, description="HOST:PORT of this machine, where other machines join; none: there are none."
    )
    devices: tuple[str, ...] = Field(default=(), description="GPUs, one for each process; none: the CPU.")
    sharding: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="ddp: every process holds the whole student; fsdp2: each one holds a part."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass: less memory, a third more time."
    )

    @property
    def total_processes(self) -> int:
        """Processes on all machines together."""
        return self.num_processes * self.num_machines

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.devices and len(self.devices) != self.num_processes:
            raise ValueError(
                f"devices must be num_processes = {self.num_processes} of them, got {len(self.devices)}; list as many"
            )
        if self.devices and self.total_processes == 1:
            raise ValueError("devices must be left out where one process trains; set student_device")
        if len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices must differ, got {self.devices}; name each once")
        if (self.address is None) != (self.num_machines == 1):
            raise ValueError(
                f"address must be given where there are several machines, and only there, got {self.address!r} with "
                f"num_machines = {self.num_machines}; set both"
            )
        if self.address is not None and not re.fullmatch(r"[^:\s]+:\d+", self.address):
            raise ValueError(f"address must be HOST:PORT, got {self.address!r}; leave out all else")
        if self.sharding == "fsdp2" and self.total_processes == 1:
            raise ValueError("sharding must be ddp where one process trains, got 'fsdp2'; raise num_processes")
        return self


class TrackingConfig(Settings):
    """Where the figures of every round are sent beside the store, by accelerate's trackers."""

    trackers: tuple[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"], ...
    ] = Field(
        default=("tensorboard",),
        description="tensorboard writes into the work folder; others need their packages, and keys in the environment.",
    )


class HardwareConfig(Settings):
    """What one device can do, for the plan that is printed before a run (docs/PLAN.md)."""

    memory_gib: float | None = Field(default=None, gt=0, description="Of one device; none: the device is asked.")
    tflops: float | None = Field(
        default=None,
        gt=0,
        description="What one device reaches in matrix products, not its peak; none: measured on CPU, else unknown.",
    )
    bandwidth_gbs: float | None = Field(
        default=None, gt=0, description="GB/s of one device's memory; none: measured on CPU, else unknown."
    )
    store_gbs: float | None = Field(default=None, gt=0, description="GB/s to and from the store; none: unknown.")


class JudgeServerConfig(Settings):
    """Where the judge of open answers is: any server with OpenAI's /v1/chat/completions."""

    url: str | None = Field(default=None, description="http://HOST:PORT/v1; none: there is no judge.")
    api_key_variable: str | None = Field(
        default=None, description="Environment variable with the server's API key; none: it asks for none."
    )
    request_timeout: float = Field(default=120.0, gt=0, description="Seconds after which a request counts as lost.")
    max_requests: int = Field(default=8, ge=1, description="Requests at a time.")


class PlacementConfig(Settings):
    """Where and how fast; nothing here changes any result's name."""

    student_device: str = Field(default="cpu", description="Training; with the engine in the box, rollouts too.")
    teacher_device: str = Field(default="cpu", description="Replay, with the engine in the box.")
    student_servers: ServersConfig = Field(default=ServersConfig(), description="Rollouts and evaluation on vLLM.")
    teacher_servers: ServersConfig = Field(default=ServersConfig(), description="Replay on vLLM.")
    judge: JudgeServerConfig = Field(default=JudgeServerConfig(), description="Where the judge of open answers is.")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="Processes that train, and their devices.")
    hardware: HardwareConfig = Field(default=HardwareConfig(), description="What a device can do, for the plan.")
    threads: int = Field(default=1, ge=1, description="CPU threads; another number may change the last bits.")
    image_threads: int = Field(default=2, ge=1, description="Threads that decode, hash and cut images.")
    max_batch_tokens: int = Field(default=16_384, ge=1, description="Tokens of a forward batch, padding included.")
    work_dir: str = Field(default=".vzero/work", description="Scratch: data of the small world, current weights.")

    @model_validator(mode="after")
    def _devices_disjoint(self) -> Self:
        devices = {
            "student_servers": self.student_servers.devices,
            "teacher_servers": self.teacher_servers.devices,
            "trainer": self.trainer.devices,
        }
        for (first, left), (second, right) in combinations(devices.items(), 2):
            if both := sorted(set(left) & set(right)):
                raise ValueError(f"devices of {first} and {second} must be disjoint, both have {both}")
        if self.trainer.total_processes > 1 and not self.trainer.devices and self.student_device != "cpu":
            raise ValueError(
                f"trainer.devices must list a GPU for each of several processes where student_device is one, got none "
                f"with {self.student_device}; list them, or set student_device to cpu"
            )
        for role, servers in (("student", self.student_servers), ("teacher", self.teacher_servers)):
            if servers.use(self.student_device):
                raise ValueError(
                    f"{role}_servers.devices must not hold student_device, where the student is trained, got "
                    f"{self.student_device}; choose another"
                )
        return self


class EngineFingerprint(Settings):
    """What computes; another engine, version or arithmetic makes other artefacts."""

    engine: str
    version: str
    torch: str | None = Field(default=None, description="None where the engine's version stands for it.")
    dtype: str
    quantization: str | None = None


class GivenRegions(Settings):
    """Every sample brings its region, or its crops."""

    kind: Literal["given"] = Field(default="given", description="Regions come with the data.")


class GridRegions(Settings):
    """Windows of the image are hidden in turn; the one the teacher's response depends on most is the region."""

    kind: Literal["grid"] = Field(default="grid", description="Search a grid of windows; any teacher.")
    scales: tuple[float, ...] = Field(
        default=(0.5, 0.25),
        min_length=1,
        description="Sides of the windows, in fractions of the image's; each scale searches inside the one before.",
    )
    overlap: float = Field(default=0.5, ge=0, lt=1, description="Share of its side that a window shares with the next.")

    @field_validator("scales")
    @classmethod
    def _shrinks(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not all(larger > smaller > 0 for larger, smaller in pairwise((1.0, *scales))):
            raise ValueError(f"scales must fall, all between 0 and 1, got {scales}; put the largest first")
        return scales


class GroundingRegions(Settings):
    """The teacher is asked for a box; for teachers that were trained to give one."""

    kind: Literal["grounding"] = Field(default="grounding", description="Ask the teacher for a box.")
    prompt: PromptConfig = Field(
        default=PromptConfig(
            template="Locate the one region of the image that is needed to answer the question: {question}\n"
            'Output its bounding box in JSON format, like {"bbox_2d": [x1, y1, x2, y2], "label": "..."}, '
            "and nothing else."
        ),
        description="How the teacher is asked.",
    )
    convention: Literal["per_mille", "resized_pixels"] = Field(
        default="per_mille",
        description="per_mille: 0 to 1000 (Qwen3-VL, Qwen3.5); resized_pixels: as the processor resized (Qwen2.5-VL).",
    )
    max_reply_tokens: int = Field(default=128, ge=1, description="Longer replies are cut.")


Proposer = Annotated[GridRegions | GroundingRegions, Field(discriminator="kind")]


class RegionsConfig(Settings):
    """Where regions come from, and which of the proposed ones are kept."""

    proposer: Annotated[GivenRegions | GridRegions | GroundingRegions, Field(discriminator="kind")] = Field(
        default=GivenRegions(), description="With the data, or proposed for samples that have none."
    )
    max_new_tokens: int = Field(
        default=8, ge=1, description="Length of the teacher's own response, which proposals are judged by."
    )
    min_contrast: float = Field(
        default=0.1,
        ge=0,
        description="A proposal is kept when showing and hiding it differ by at least this many nats per token.",
    )
    min_kept_share: float = Field(
        default=0.2, ge=0, le=1, description="Where a smaller share of the proposals is kept, the run stops."
    )
