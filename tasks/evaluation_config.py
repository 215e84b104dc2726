"""Settings of what models are measured on, how answers are scored, and how a checkpoint is chosen."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tasks.config import Location, PromptConfig, Settings

HELD_OUT = "held-out"
"""Name of the benchmark that the data's own evaluation questions are."""


class GenerationConfig(Settings):
    """How a model answers the questions of a benchmark."""

    temperature: float = Field(default=0.0, ge=0, le=2, description="0: the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Likeliest tokens up to this share of probability.")
    top_k: int = Field(default=0, ge=0, description="So many of the likeliest tokens; 0: all.")
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken from the logits of tokens that the answer holds already."
    )
    max_new_tokens: int = Field(default=8, ge=1, description="Longer answers are cut.")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="One answer to each question for each seed.")

    @model_validator(mode="after")
    def _seeds_count(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}; name each once")
        if self.temperature == 0 and len(self.seeds) > 1:
            raise ValueError(
                f"seeds must be one where temperature is 0, which gives the same answer to every seed, got "
                f"{len(self.seeds)}; raise temperature or leave seeds out"
            )
        return self


class ExactProtocol(Settings):
    """The answer that a pattern finds must be the right one, but for case, outer space and a final full stop."""

    kind: Literal["exact"] = Field(default="exact", description="A pattern finds the answer.")
    answer_pattern: str = Field(
        default=r"<answer>(.*?)</answer>",
        description="Regular expression; its first group, in its last match, is the answer.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern must be a regular expression, got {pattern!r} ({error})") from error
        if groups != 1:
            raise ValueError(f"answer_pattern must have one group, got {groups}; put the answer in (...)")
        return pattern


class ZwzProtocol(Settings):
    """As ZwZ's mm-eval scores without a judge (docs/SCORING.md)."""

    kind: Literal["zwz"] = Field(default="zwz", description="ZwZ's mm-eval.")


class VLMEvalKitProtocol(Settings):
    """As VLMEvalKit's exact matching scores, without a judge and without a random choice (docs/SCORING.md)."""

    kind: Literal["vlmevalkit"] = Field(default="vlmevalkit", description="VLMEvalKit's exact matching.")


Protocol = Annotated[ExactProtocol | ZwzProtocol | VLMEvalKitProtocol, Field(discriminator="kind")]


class JudgeConfig(Settings):
    """A model that decides whether an open answer means the same as the right one; where it is says `placement`."""

    model: str = Field(description="Its name on the server.")
    template: str = Field(
        default="Question: {question}\nRight answer: {answer}\nGiven answer: {response}\n"
        "Does the given answer mean the same as the right answer? Reply with yes or no alone.",
        description="What it is asked; {question}, {answer} and {response} are replaced.",
    )
    max_new_tokens: int = Field(default=16, ge=1, description="Longer replies are cut.")

    @field_validator("template")
    @classmethod
    def _has_all(cls, template: str) -> str:
        if missing := [name for name in ("{question}", "{answer}", "{response}") if name not in template]:
            raise ValueError(f"template must contain {', '.join(missing)}, got {template!r}; add it")
        return template


BenchmarkKind = Literal["vstar", "hr_bench_4k", "hr_bench_8k", "zoombench", "mme_realworld", "mmstar", "jsonl"]
Aggregate = Literal["rows", "cycles", "categories"]


class BenchmarkConfig(Settings):
    """Questions with answers that the student is measured on, before training and after (docs/BENCHMARKS.md)."""

    name: str = Field(description="How it is called in the report.", pattern=r"^[\w.-]+$")
    kind: BenchmarkKind = Field(description="Which published benchmark; jsonl: your own questions.")
    path: Location = Field(description="The file, or a URL, or a folder with files of the benchmark.")
    image_root: Location | None = Field(
        default=None, description="Folder or URL that relative image paths count from; none: the file's folder."
    )
    protocol: Protocol = Field(default=ExactProtocol(), description="How answers are scored.")
    prompt: PromptConfig | None = Field(default=None, description="How questions become prompts; none: as in training.")
    choice_template: str = Field(
        default="{question}\n{options}",
        description="Text of a question with options, which are replaced by lines such as A. red.",
    )
    generation: GenerationConfig = Field(
        default=GenerationConfig(max_new_tokens=2048), description="How it is answered."
    )
    aggregate: Aggregate | None = Field(
        default=None,
        description="The score: mean over rows, over the means of cycles, or over those of categories; none: as the "
        "protocol has it.",
    )
    judge: JudgeConfig | None = Field(default=None, description="Judges open answers; none: by the protocol alone.")

    @field_validator("choice_template")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if template.count("{question}") != 1 or template.count("{options}") != 1:
            raise ValueError(f"choice_template must contain {{question}} and {{options}} once, got {template!r}")
        return template

    @model_validator(mode="after")
    def _judge_is_asked(self) -> Self:
        if self.judge is not None and self.protocol.kind == "vlmevalkit":
            raise ValueError("judge has no effect with protocol vlmevalkit, which has none; remove it")
        return self


class EvaluateConfig(Settings):
    """How accuracy on the data's own held-out questions is measured."""

    every: int = Field(default=20, ge=1, description="Rounds between measurements of the student.")
    protocol: Protocol = Field(
        default=ExactProtocol(answer_pattern=r"answer (\S+)"), description="How answers are scored."
    )
    generation: GenerationConfig = Field(default=GenerationConfig(), description="How questions are answered.")


class SelectionConfig(Settings):
    """How a checkpoint is chosen without labels: by prompts that training is kept clear of (docs/SELECTION.md)."""

    num_prompts: int = Field(
        default=64, ge=0, description="Training prompts that are set aside for it; 0: the last checkpoint is taken."
    )
    num_responses: int = Field(default=4, ge=1, description="Responses to each of them.")
    every: int = Field(default=10, ge=1, description="Rounds between candidates; the last round is always one.")


class RetrainConfig(Settings):
    """How the champion is trained on with new samples, and when the result takes its place (docs/RETRAINING.md)."""

    min_new: int = Field(default=64, ge=1, description="Fewer new samples wait for more.")
    replay_share: float = Field(default=0.5, ge=0, lt=1, description="Share of old samples among those trained on.")
    num_rounds: int | None = Field(default=None, ge=1, description="Rounds of a retraining; none: rounds.num_rounds.")
    promotion: BenchmarkConfig | None = Field(
        default=None,
        description="Your own labelled questions that decide; none: the teacher's support decides, without labels.",
    )
    margin: float = Field(
        default=0.03, ge=0, le=1, description="Accuracy that a benchmark may lose at most, with 95% confidence."
    )
