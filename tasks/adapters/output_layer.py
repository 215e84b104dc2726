"""A language model's output layer and its log-softmax in chunks: [N, V] logits never exist as a whole.

The backward pass computes each chunk's logits again. Legend: N positions, V vocabulary, H hidden size, K kept tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vzero_core.divergence import topk_with_rest
from vzero_core.masking import at_least_float32

CHUNK_LOGITS = 2**25
"""Logits at a time: 128 MiB in float32, and products still large enough for any device."""


class TokenScores(NamedTuple):
    """Log-probs at N positions, in nats and at least float32.

    Attributes:
        logprobs: [N]; of each position's own token.
        topk_logprobs: [N, K]; of the chosen tokens.
        rest: [N]; log of the mass of all but the chosen tokens, -inf where K = V.
        entropy: [N]; of the distribution, without a gradient.
    """

    logprobs: Tensor
    topk_logprobs: Tensor
    rest: Tensor
    entropy: Tensor


def score_tokens(hidden: Tensor, weight: Tensor, token_ids: Tensor, topk_ids: Tensor | None = None) -> TokenScores:
    """Give log-probs of each position's token and of K chosen ones, straight from the hidden states.

    With logits = hidden weight^T it is log_softmax and `divergence.topk_with_rest`. Products are taken in the type
    of `hidden` (under autocast, in autocast's, as a linear layer takes them), all else in at least float32.

    Args:
        hidden: [N, H] float; the last hidden states.
        weight: [V, H] float; the output layer's, which has no bias.
        token_ids: [N] int64.
        topk_ids: [N, K] int64, distinct within a row, K <= V; None for no such tokens.

    Returns:
        Scores, differentiable once in `hidden` and `weight`; a rest of -inf has the gradient 0.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if topk_ids is None:
        topk_ids = token_ids.new_empty(len(token_ids), 0)
    return TokenScores(*_ScoreTokens.apply(hidden, weight, token_ids, topk_ids))  # type: ignore[no-untyped-call]


def score_logits(logits: Tensor, token_ids: Tensor, topk_ids: Tensor | None = None) -> TokenScores:
    """Give what `score_tokens` gives, from all logits at once.

    Args:
        logits: [N, V] float.
        token_ids: [N] int64.
        topk_ids: [N, K] int64, distinct within a row, K <= V; None for no such tokens.
    """
    logprobs = at_least_float32(logits).log_softmax(-1)
    topk, rest = topk_with_rest(logits, token_ids.new_empty(len(token_ids), 0) if topk_ids is None else topk_ids)
    entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
    return TokenScores(logprobs.gather(-1, token_ids[:, None])[:, 0], topk, rest, entropy)


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, topk_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        product_weight = weight.to(hidden.dtype)
        parts: list[tuple[Tensor, ...]] = []
        for rows in _chunks(hidden, weight):
            logits = at_least_float32(hidden[rows] @ product_weight.T)
            # Log-probs of large logits would else carry the rounding of the logits' size.
            largest = logits.amax(-1, keepdim=True)
            token = logits.sub_(largest).gather(-1, token_ids[rows, None])
            chosen = logits.gather(-1, topk_ids[rows])
            others = logits.scatter_(-1, topk_ids[rows], -torch.inf).logsumexp(-1, keepdim=True)
            total = torch.cat([chosen, others], dim=-1).logsumexp(-1, keepdim=True)
            probs = logits.sub_(total).exp_()
            entropy = torch.special.entr(probs, out=probs).sum(-1) + torch.special.entr((chosen - total).exp()).sum(-1)
            parts.append((token - total, chosen - total, others - total, entropy, largest, total))
        own, topk, rest, entropy, largest, total = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, token_ids, topk_ids, topk, rest, largest, total)
        ctx.mark_non_differentiable(entropy)
        return own[:, 0], topk, rest[:, 0], entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, own_grad: Tensor, topk_grad: Tensor, rest_grad: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, token_ids, topk_ids, topk, rest, largest, total = ctx.saved_tensors
        _, weight_needed, *_ids = ctx.needs_input_grad
        product_weight = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=total.dtype) if weight_needed else None
        # Where nothing is left over the rest is a constant.
        rest_grad = rest_grad[:, None].masked_fill(rest == -torch.inf, 0.0)
        sum_grad = own_grad[:, None] + topk_grad.sum(-1, keepdim=True) + rest_grad
        # d own = [own] - p; d topk = [topk] - p; d rest = q - p with q = p / exp(rest) on all others, 0 on the chosen.
        others_grad = rest_grad - sum_grad * rest.exp()
        chosen_grad = topk_grad - sum_grad * topk.exp()
        for rows in _chunks(hidden, weight):
            logits = at_least_float32(hidden[rows] @ product_weight.T)
            grad = logits.sub_(largest[rows]).sub_((total + rest)[rows]).exp_().mul_(others_grad[rows])
            grad.scatter_(-1, topk_ids[rows], chosen_grad[rows])
            grad.scatter_add_(-1, token_ids[rows, None], own_grad[rows, None])
            narrow = grad.to(hidden.dtype)
            torch.mm(narrow, product_weight, out=hidden_grad[rows])
            if weight_grad is None:
                continue
            if narrow.dtype == weight_grad.dtype:
                weight_grad.addmm_(narrow.T, hidden[rows])
            else:
                weight_grad.add_(narrow.T @ hidden[rows])
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
