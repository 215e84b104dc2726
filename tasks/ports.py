"""What has more than one implementation: the engines. Stages know these, never a vendor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

Advance = Callable[[int], None]
"""Called with the number of prompts just finished."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: rendered text with one image placeholder per image."""

    text: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class SamplingRequest:
    """One prompt and the seeds of its responses; each response's randomness is its seed's alone."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """A sampled response: its tokens, end-of-turn included, and their log-probs under the sampler."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool


@dataclass(frozen=True)
class ReplayRequest:
    """One prompt and the responses whose tokens are scored as its continuation."""

    prompt: Prompt
    responses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ResponseScores:
    """Scores of one response of T tokens, nats.

    Attributes:
        logprobs: [T] float32; of the response's own tokens.
        max_logprobs: [T] float32; of the likeliest token at each position.
        topk_ids: [T, K] int64, likeliest first; K is 0 where none was asked for.
        topk_logprobs: [T, K] float32.
    """

    logprobs: torch.Tensor
    max_logprobs: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor


class PolicyEngine(Protocol):
    """Samples responses."""

    def load_weights(self, folder: Path, digest: str) -> None:
        """Hold the weights of a model folder; nothing happens where it already holds that digest."""

    def sample(
        self, requests: Sequence[SamplingRequest], *, temperature: float, max_new_tokens: int, advance: Advance
    ) -> list[list[Response]]:
        """Give, per request, one response per seed; temperature 0 takes the likeliest token."""


class TeacherScorer(Protocol):
    """Replays given responses."""

    def score(self, requests: Sequence[ReplayRequest], *, top_k: int, advance: Advance) -> list[list[ResponseScores]]:
        """Give, per request, the scores of each of its responses."""
