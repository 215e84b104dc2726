"""The output layer in chunks against all logits at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tasks.adapters import output_layer
from tasks.adapters.output_layer import TokenScores, score_logits, score_tokens
from vzero_core.divergence import topk_with_rest

N, V, H, K = 23, 50, 8, 5
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four positions, the last of three."""
    monkeypatch.setattr(output_layer, "CHUNK_LOGITS", 4 * V + V // 2)


def inputs(dtype: torch.dtype, scale: float = 1.0, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, H, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()
    topk_ids = torch.rand(N, V, generator=random).topk(k, dim=-1).indices
    token_ids = torch.randint(V, (N,), generator=random)
    # Every other token is one of the chosen ones.
    token_ids[::2] = topk_ids[::2, -1]
    return hidden, weight, token_ids, topk_ids


def all_at_once(hidden: Tensor, weight: Tensor, token_ids: Tensor, topk_ids: Tensor) -> TokenScores:
    logits = hidden @ weight.T
    logprobs = logits.log_softmax(-1)
    topk, rest = topk_with_rest(logits, topk_ids)
    return TokenScores(
        logprobs.gather(-1, token_ids[:, None])[:, 0], topk, rest, -(logprobs.exp() * logprobs).sum(-1).detach()
    )


def gradients(scores: TokenScores, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for values in (scores.logprobs, scores.topk_logprobs, scores.rest):
        factors = torch.randn(values.shape, generator=random, dtype=torch.float64)
        total = total + torch.where(values == -torch.inf, 0.0, factors * values.double()).sum()
    return list(torch.autograd.grad(total, (hidden, weight)))


def close(found: Tensor, expected: Tensor, limit: float) -> bool:
    return bool((found - expected).norm() <= limit * expected.norm())


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["plain", "large logits"])
@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_scores_and_gradients_equal_those_of_all_logits(dtype: torch.dtype, k: int, scale: float) -> None:
    hidden, weight, token_ids, topk_ids = inputs(dtype, scale, k)
    found = score_tokens(hidden, weight, token_ids, topk_ids)
    expected = all_at_once(hidden, weight, token_ids, topk_ids)
    for name in ("logprobs", "topk_logprobs", "rest", "entropy"):
        values, right = getattr(found, name), getattr(expected, name)
        finite = right != -torch.inf
        assert torch.equal(values != -torch.inf, finite), name
        assert close(values[finite], right[finite], EXACT[dtype]), name
    assert bool((found.rest == -torch.inf).all()) == (k == V)
    assert not found.entropy.requires_grad
    limit = EXACT[dtype] if scale == 1.0 else 10 * EXACT[dtype]
    for grad, right in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert close(grad, right, limit)


def test_without_chosen_tokens_the_rest_is_everything() -> None:
    hidden, weight, token_ids, _ = inputs(torch.float64)
    scores = score_tokens(hidden, weight, token_ids)
    assert scores.topk_logprobs.shape == (N, 0)
    assert scores.rest.abs().max() == 0
    right = torch.autograd.grad((hidden @ weight.T).log_softmax(-1)[torch.arange(N), token_ids].sum(), weight)[0]
    assert close(torch.autograd.grad(scores.logprobs.sum(), weight)[0], right, EXACT[torch.float64])


@pytest.mark.parametrize("topk", [True, False])
def test_scores_of_logits_are_the_same(topk: bool) -> None:
    """Where a model computes its logits itself."""
    hidden, weight, token_ids, topk_ids = inputs(torch.float64)
    chosen = topk_ids if topk else None
    found, expected = (
        score_logits(hidden @ weight.T, token_ids, chosen),
        score_tokens(hidden, weight, token_ids, chosen),
    )
    for name, values in found._asdict().items():
        assert (values - getattr(expected, name)).abs().max() <= EXACT[torch.float64] if values.numel() else not topk
    for grad, right in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert close(grad, right, EXACT[torch.float64])
    assert not found.entropy.requires_grad


def test_gradients_equal_finite_differences() -> None:
    hidden, weight, token_ids, topk_ids = inputs(torch.float64)

    def three(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        scores = score_tokens(hidden, weight, token_ids, topk_ids)
        return scores.logprobs, scores.topk_logprobs, scores.rest

    assert torch.autograd.gradcheck(three, (hidden, weight))


def test_a_rest_too_small_for_float32_keeps_its_digits_and_its_gradient() -> None:
    """Chosen logits of 200 above the others: a rest of e^-200, below any float32."""
    weight = torch.zeros(V, H)
    weight[:K, 0] = 200.0
    weight[:, 1] = torch.linspace(-1, 1, V)
    hidden = torch.zeros(N, H)
    hidden[:, :2] = 1.0
    _, _, token_ids, _ = inputs(torch.float32)
    topk_ids = torch.arange(K).expand(N, -1)
    results = []
    for function in (score_tokens, all_at_once):
        own_hidden, own_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        scores = function(own_hidden, own_weight, token_ids, topk_ids)
        results.append((scores.rest, *torch.autograd.grad(scores.rest.sum(), (own_hidden, own_weight))))
    assert results[0][0].max() < -190
    for found, right in zip(*results, strict=True):
        assert right.abs().max() > 0
        assert close(found, right, 1e-6)


def test_a_rest_of_nothing_is_a_constant() -> None:
    hidden, weight, token_ids, topk_ids = inputs(torch.float64, k=V)
    score_tokens(hidden, weight, token_ids, topk_ids).rest.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    tensors = dict(zip(("hidden", "weight", "token_ids", "topk_ids"), inputs(torch.float64), strict=True))
    moving = tensors["weight" if frozen == "hidden" else "hidden"]
    right = torch.autograd.grad(all_at_once(**tensors).rest.sum(), moving)[0]
    tensors[frozen].requires_grad_(False)
    score_tokens(**tensors).rest.sum().backward()
    assert tensors[frozen].grad is None
    assert moving.grad is not None
    assert close(moving.grad, right, EXACT[torch.float64])


def test_under_autocast_products_are_narrow_and_sums_are_not() -> None:
    """A weight's gradient of 23 positions, each a chunk: in bfloat16 a sum of many like terms would stand still."""
    hidden, weight, token_ids, topk_ids = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_tokens(hidden, weight, token_ids, topk_ids)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    right = logits.float().log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]
    assert found.logprobs.dtype == torch.float32
    assert (found.logprobs - right).abs().max() <= 1e-5
    for grad, wide in zip(
        gradients(found, hidden, weight),
        gradients(all_at_once(hidden, weight, token_ids, topk_ids), hidden, weight),
        strict=True,
    ):
        assert grad.dtype == torch.float32
        assert close(grad, wide, 2e-2)


def test_a_weights_gradient_is_summed_in_float32() -> None:
    """2,000 equal terms: a bfloat16 sum stops at 256 of them."""
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, requires_grad=True)
    token_ids = torch.zeros(2000, dtype=torch.int64)
    score_tokens(hidden, weight, token_ids).logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == pytest.approx([1500, -500, -500, -500])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = "transpose.int", "t.default", "detach.default", "alias.default"
        if not str(func).endswith(views):
            sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize(("function", "limit"), [(score_tokens, max(5 * V, V * H)), (all_at_once, None)])
def test_nothing_is_larger_than_a_chunk_or_the_weight(function: Callable[..., TokenScores], limit: int | None) -> None:
    hidden, weight, token_ids, topk_ids = inputs(torch.float32)
    with Largest() as largest:
        gradients(function(hidden, weight, token_ids, topk_ids), hidden, weight)
    if limit is None:
        assert largest.numel >= N * V
    else:
        assert V < largest.numel <= limit < N * V
