import pytest
import torch

from vzero_core.errors import InputError
from vzero_core.masking import (
    at_least_float32,
    masked_mean,
    masked_sum,
    require_finite,
    require_mask,
    require_shape,
    zero_padding,
)

NAN = float("nan")
INF = float("inf")


def test_sum_and_mean_by_hand() -> None:
    values = torch.tensor([[1.0, NAN, 5.0], [NAN, INF, -INF]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_sum(values, mask).tolist() == [6.0, 0.0]
    assert masked_mean(values, mask).tolist() == [3.0, 0.0]


def test_gradient_is_exactly_zero_at_padding() -> None:
    values = torch.tensor([[1.0, NAN, 5.0]], requires_grad=True)
    masked_mean(values, torch.tensor([[True, False, True]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.0, 0.5]]


def test_trailing_axes_are_masked_as_a_whole() -> None:
    values = torch.full((1, 2, 3), NAN)
    values[0, 0] = 7.0
    assert zero_padding(values, torch.tensor([[True, False]])).tolist() == [[[7.0] * 3, [0.0] * 3]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_is_refused_under_the_mask_only(bad: float) -> None:
    values = torch.tensor([[0.0, 0.0], [bad, bad]])
    require_finite("values", values, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(InputError, match=r"values must be finite .* at \(1, 1\)"):
        require_finite("values", values, torch.tensor([[True, True], [False, True]]))


def test_wrong_mask_and_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask must be .* bool"):
        require_mask("mask", torch.ones(2, 3))
    with pytest.raises(InputError, match="mask must be"):
        require_mask("mask", torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"x must be of shape \(2, 3\), got \(1, 3\)"):
        require_shape("x", torch.ones(1, 3), (2, 3))


def test_narrow_types_are_widened_and_wide_ones_kept() -> None:
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float32)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
