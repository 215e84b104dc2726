"""Settings of the stages. `flows.config.RunConfig` puts them together; each stage sees its own slice only."""

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


class JsonlData(Settings):
    """Your own data: a JSONL file with id, image, question, region (xyxy pixels) a line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="The JSONL file; images with relative paths count from its folder.")
    evaluation_path: str | None = Field(
        default=None, description="JSONL with id, image, question, answer; none: no accuracy is measured."
    )


class DataConfig(Settings):
    """What to train on and what to measure on."""

    source: Annotated[SmallWorldData | JsonlData, Field(discriminator="kind")] = Field(
        default=SmallWorldData(), description="The small world, or your own files."
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="Above this share of bad rows the run stops; below, they are set aside."
    )
    max_image_pixels: int = Field(
        default=100_000_000, ge=1, description="Larger images are refused before they are decoded."
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

    url: str = Field(default=".vzero/store", description="Folder or fsspec URL.")


class PlacementConfig(Settings):
    """Where and how fast; nothing here changes any result's name."""

    student_device: str = Field(default="cpu", description="Rollouts, evaluation and training.")
    teacher_device: str = Field(default="cpu", description="Replay.")
    threads: int = Field(default=1, ge=1, description="CPU threads; another number may change the last bits.")
    max_batch_tokens: int = Field(default=16_384, ge=1, description="Tokens of a forward batch, padding included.")
    work_dir: str = Field(default=".vzero/work", description="Scratch: data of the small world, current weights.")


class EngineFingerprint(Settings):
    """What computes; another engine, version or arithmetic makes other artefacts."""

    engine: str
    version: str
    torch: str
    dtype: str
    quantization: str | None = None
