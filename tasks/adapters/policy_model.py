"""The student that learns, as one module from prompts and responses to scores: what DDP and FSDP2 can wrap."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.adapters.forward import response_logits
from tasks.adapters.output_layer import TokenScores, score_logits, score_tokens
from tasks.adapters.packed import enable_packing, packed_hidden, takes_packed_rows
from tasks.adapters.prompts import ModelInputs

TOLERANCE = 1e-3
"""Nats; rounding in float32 stays below 1e-4, and a layer that sees the wrong tokens is off by far more."""


class PolicyModel(nn.Module):
    """A student whose forward pass scores a forward batch, in packed rows where these are exact.

    Attributes:
        model: the student.
        packed: whether a prompt is computed once for its responses.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the plain way until `try_packing` has been asked."""
        super().__init__()
        self.model = model
        self.packed = False

    def forward(
        self, prompts: Sequence[ModelInputs], responses: Tensor, mask: Tensor, topk_ids: Tensor | None = None
    ) -> TokenScores:
        """Score the tokens of a forward batch, one response after the other, without padding.

        Args:
            prompts: N encoded prompts of equal signature.
            responses: [B, T] int64, B = N * G in the prompts' order, padded on the right with any text token.
            mask: [B, T] bool; False for padding.
            topk_ids: [n, K] int64 for the n tokens that are no padding; None for no such tokens.
        """
        if self.packed:
            hidden = packed_hidden(self.model, prompts, responses)[mask]
            return score_tokens(hidden, self.model.get_output_embeddings().weight, responses[mask], topk_ids)
        share = len(responses) // len(prompts)
        logits = response_logits(self.model, [prompt for prompt in prompts for _ in range(share)], responses)
        return score_logits(logits[mask], responses[mask], topk_ids)

    @torch.no_grad()
    def try_packing(self, wrapper: nn.Module, prompt: ModelInputs, responses: Tensor) -> bool:
        """Take packed rows from now on if they give what plain passes give; tell whether they do.

        Refused unseen are attention in windows, for a short input fits into a window, and any attention but "sdpa".

        Args:
            wrapper: what wraps this module, or the module itself; weights in float32 or wider.
            prompt: any encoded prompt.
            responses: [G, T] int64, G >= 2 and T >= 3; any text tokens.
        """
        if not takes_packed_rows(self.model):
            return False
        mask = torch.ones_like(responses, dtype=torch.bool)
        plain = wrapper([prompt], responses, mask)
        enable_packing(self.model)
        self.packed = True
        found = wrapper([prompt], responses, mask)
        self.packed = bool((found.logprobs - plain.logprobs).abs().max() <= TOLERANCE)
        return self.packed
