"""What has more than one implementation: engines, and versions of data. Stages and flows know these, never a vendor."""

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
    """One prompt and the seeds of its responses; their randomness follows from these seeds alone."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """A sampled response: its tokens, end-of-turn included, and their log-probs under the sampler.

    Attributes:
        weights: digest of the weights that sampled it, as the engine names them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool
    weights: str | None


@dataclass(frozen=True)
class ReplayRequest:
    """One prompt and the responses whose tokens are scored as its continuation.

    Attributes:
        prompt: where several requests begin with the very same image object and the same text before and around it,
            an engine may compute that once for all of them.
        responses: token ids.
        top_k: how many of the likeliest tokens are wanted at each position.
    """

    prompt: Prompt
    responses: tuple[tuple[int, ...], ...]
    top_k: int = 0


@dataclass(frozen=True)
class ResponseScores:
    """Scores of one response of T tokens, nats.

    Attributes:
        logprobs: [T] float32; of the response's own tokens.
        topk_ids: [T, K] int64, likeliest first; K is 0 where none was asked for.
        topk_logprobs: [T, K] float32.
        num_tokens: of prompt and response.
        num_computed_tokens: how many of them the engine computed for this response, and did not share or remember.
    """

    logprobs: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    num_tokens: int
    num_computed_tokens: int


class PolicyEngine(Protocol):
    """Samples responses."""

    def load_weights(self, folder: Path, digest: str) -> None:
        """Hold the weights of a model folder; nothing happens where it already holds that digest."""

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        *,
        temperature: float,
        max_new_tokens: int,
        advance: Advance,
        top_p: float = 1.0,
        top_k: int = 0,
        presence_penalty: float = 0.0,
    ) -> list[list[Response]]:
        """Give, per request, one response per seed.

        The settings that change probabilities apply in this order: presence penalty, temperature, top-k, top-p. The
        log-probs of a response are the model's own, as if none applied.

        Args:
            requests: prompts and seeds.
            temperature: 0 takes the likeliest token.
            max_new_tokens: longer responses are cut.
            advance: called as prompts are finished.
            top_p: the likeliest tokens up to this share of probability, in (0, 1]; at least one.
            top_k: so many of the likeliest tokens, and what is as likely as the last of them; 0 for all.
            presence_penalty: nats taken from the logits of tokens that the response, not the prompt, holds already.
        """


class TeacherScorer(Protocol):
    """Replays given responses."""

    def score(self, requests: Sequence[ReplayRequest], *, advance: Advance) -> list[list[ResponseScores]]:
        """Give, per request, the scores of each of its responses."""


class DatasetRepo(Protocol):
    """Keeps versions of data and outputs under names; where there is none, digests are the versions.

    Every method can be called again after an error, and waits itself for a server that is away.
    """

    def url(self, ref: str, path: str) -> str:
        """Give the URL of a file under a branch, tag or commit id."""

    def pin(self, ref: str) -> str:
        """Give the id of the commit that a branch, tag or commit id names now."""

    def branch(self, name: str, source: str) -> None:
        """Make a branch at a ref; one that is there stays as it is."""

    def commit(self, branch: str, message: str, metadata: dict[str, str]) -> str:
        """Commit what was written to a branch and give the commit's id; with nothing written, that of its head."""

    def merge(self, source: str, into: str, message: str, metadata: dict[str, str]) -> str:
        """Merge a ref into a branch and give the commit id of the merge, or of the head where all is merged already."""

    def tag(self, name: str, commit: str) -> None:
        """Let a tag name a commit, and no longer the one it named before."""
