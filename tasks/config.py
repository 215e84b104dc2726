"""Settings of the stages. `flows.config.RunConfig` puts them together; each stage sees its own slice only."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vzero_core.config import Target

EMBEDDED = "embedded:"
"""Prefix of a model path that names one of the small world's models."""


class Settings(BaseModel):
    """Base of all settings: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SmallWorldData(Settings):
    """The embedded small world: scenes drawn from a seed, no download."""

    kind: Literal["small_world"] = "small_world"
    num_prompts: int = Field(default=1920, ge=1, description="Training prompts.")
    num_evaluation: int = Field(default=1000, ge=1, description="Held-out questions, always the same ones.")
    seed: int = Field(default=0, ge=0, description="Which training scenes are drawn.")


class FileData(Settings):
    """Your own data, in the project's format or another one; answers in it are dropped at the door."""

    kind: Literal[
        "jsonl", "parquet", "zwz_rl_vqa", "visual_cot", "viscot_363k", "treevgr_rl_37k", "vstar_seal", "vzero_release"
    ] = Field(description="Format of the rows (docs/DATA.md). jsonl and parquet: id, image, question, region.")
    path: str = Field(description="The file, or a URL; with several files of one format, a folder.")
    image_root: str | None = Field(
        default=None, description="Folder or URL that relative image paths count from; none: the file's folder."
    )
    box_format: Literal["xyxy", "xywh"] | None = Field(default=None, description="None: as the format has it.")
    box_unit: Literal["pixels", "fraction", "per_mille"] | None = Field(
        default=None,
        description="Pixels, or parts of the image's sides: 0 to 1, 0 to 1000. None: as the format has it.",
    )
    license: str | None = Field(default=None, description="Licence of rows that name none.")
    evaluation_path: str | None = Field(
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
    compare_with: tuple[str, ...] = Field(
        default=(),
        description="JSONL files of images and questions that no training image may come from: your benchmarks.",
    )


class ModelConfig(Settings):
    """A Hugging Face model folder."""

    path: str = Field(description="Folder with config.json, safetensors, tokenizer and image processor.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Arithmetic; in bfloat16, training keeps weights and moments in float32."
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


class EvaluateConfig(Settings):
    """How accuracy is measured."""

    every: int = Field(default=20, ge=1, description="Rounds between measurements of the student.")
    answer_pattern: str = Field(
        default=r"answer (\S+)", description="Regular expression; its first group, in its last match, is the answer."
    )
    max_new_tokens: int = Field(default=8, ge=1, description="Longer answers are cut.")

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        import re

        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern must be a regular expression, got {pattern!r} ({error})") from error
        if groups != 1:
            raise ValueError(f"answer_pattern must have one group, got {groups}; put the answer in (...)")
        return pattern


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


class OutputsConfig(Settings):
    """Versions of a run's outputs in lakeFS (docs/LAKEFS.md); without a repository the store alone keeps them."""

    repository: str | None = Field(default=None, description="lakeFS repository for model, report and samples.")
    base: str = Field(default="main", description="Branch that the run's branch starts from.")
    publish: bool = Field(
        default=False, description="At the end, merge the run's branch into the base and tag it champion."
    )


class PlacementConfig(Settings):
    """Where and how fast; nothing here changes any result's name."""

    student_device: str = Field(default="cpu", description="Rollouts, evaluation and training.")
    teacher_device: str = Field(default="cpu", description="Replay.")
    threads: int = Field(default=1, ge=1, description="CPU threads; another number may change the last bits.")
    image_threads: int = Field(default=2, ge=1, description="Threads that decode, hash and cut images.")
    max_batch_tokens: int = Field(default=16_384, ge=1, description="Tokens of a forward batch, padding included.")
    work_dir: str = Field(default=".vzero/work", description="Scratch: data of the small world, current weights.")


class EngineFingerprint(Settings):
    """What computes; another engine, version or arithmetic makes other artefacts."""

    engine: str
    version: str
    torch: str
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
