import math

import pytest
import torch

from vzero_core.config import GateConfig
from vzero_core.errors import InputError
from vzero_core.gating import gate_weights, group_statistics, prefix_trust

NAN = float("nan")
ONE_GROUP = torch.zeros(3, dtype=torch.int64)


def test_golden_gate() -> None:
    # mean 1, population variance (1 + 0 + 1) / 3, std sqrt(2/3) = 0.8165; a = -1.2247, 0, 1.2247
    scores = torch.tensor([0.0, 1.0, 2.0])
    weights = gate_weights(scores, ONE_GROUP, GateConfig(alpha=0.5))
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx([1 - 0.5 * math.sqrt(1.5), 1.0, 1 + 0.5 * math.sqrt(1.5)], abs=2e-6)
    # alpha 1: 1 -+ 1.2247 is cut at the bounds
    assert gate_weights(scores, ONE_GROUP, GateConfig(alpha=1.0)).tolist() == [0.0, 1.0, 2.0]
    assert gate_weights(scores, ONE_GROUP, GateConfig(w_min=0.25, w_max=1.5)).tolist() == [0.25, 1.0, 1.5]


def test_eps_is_added_to_the_standard_deviation() -> None:
    # scores +-1: std 1, a = +-1 / (1 + 1)
    weights = gate_weights(torch.tensor([-1.0, 1.0]), ONE_GROUP[:2], GateConfig(eps=1.0))
    assert weights.tolist() == [0.5, 1.5]


def test_groups_are_apart_in_any_order_and_size() -> None:
    # group 7: 0, 2 (a = -1, 1); group -3: alone; group 5: 1, 1, 1 (no spread)
    scores = torch.tensor([0.0, 1.0, 9.0, 2.0, 1.0, 1.0])
    groups = torch.tensor([7, 5, -3, 7, 5, 5])
    weights = gate_weights(scores, groups, GateConfig(alpha=0.5))
    assert weights.tolist() == pytest.approx([0.5, 1.0, 1.0, 1.5, 1.0, 1.0], abs=1e-6)
    assert weights[2].item() == 1.0


def test_a_group_below_min_spread_is_not_gated() -> None:
    scores = torch.tensor([0.0, 0.002, 0.0, 0.2], dtype=torch.float64)  # std .001 and .1
    groups = torch.tensor([0, 0, 1, 1])
    weights = gate_weights(scores, groups, GateConfig(alpha=0.5, min_spread=0.01))
    assert weights[:2].tolist() == [1.0, 1.0]
    assert weights[2:].tolist() == pytest.approx([0.5, 1.5], abs=1e-4)
    # the bound itself still gates: std of (0, 2) is exactly 1
    bound = gate_weights(torch.tensor([0.0, 2.0]), groups[:2], GateConfig(alpha=0.5, min_spread=1.0))
    assert bound.tolist() == pytest.approx([0.5, 1.5], abs=1e-6)


def test_rounding_noise_is_amplified_without_min_spread_and_not_with_it() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-5, 1.0 - 1e-5], dtype=torch.float64)
    assert (gate_weights(scores, ONE_GROUP, GateConfig()) - 1).abs().max() > 0.9
    assert gate_weights(scores, ONE_GROUP, GateConfig(min_spread=1e-3)).tolist() == [1.0, 1.0, 1.0]


def test_weights_are_detached() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    assert not gate_weights(scores, ONE_GROUP, GateConfig()).requires_grad


def test_no_response_gives_no_weight() -> None:
    assert gate_weights(torch.zeros(0), torch.zeros(0, dtype=torch.int64), GateConfig()).shape == (0,)


def test_statistics_by_hand() -> None:
    statistics = group_statistics(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([9, 2, 9]))
    assert statistics.index.tolist() == [1, 0, 1]
    assert statistics.count.tolist() == [1, 2]
    assert statistics.mean.tolist() == [5.0, 2.0]
    assert statistics.std.tolist() == [0.0, 1.0]


def test_wrong_gate_input_is_refused() -> None:
    with pytest.raises(InputError, match="scores must be finite"):
        gate_weights(torch.tensor([0.0, NAN, 1.0]), ONE_GROUP, GateConfig())
    with pytest.raises(InputError, match="int64"):
        gate_weights(torch.zeros(3), torch.zeros(3), GateConfig())
    with pytest.raises(InputError, match="group_ids must be of shape"):
        gate_weights(torch.zeros(3), ONE_GROUP[:2], GateConfig())
    with pytest.raises(InputError, match="one score per response"):
        gate_weights(torch.zeros(3, 1), ONE_GROUP, GateConfig())


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_golden_prefix_trust() -> None:
    # ratios p / p_max: 1, 1/2, 1/4; trust 1, then the product of what stands before: 1, 1/2. The last is never used.
    trust = prefix_trust(log(0.6, 0.3, 0.2), log(0.6, 0.6, 0.8), torch.ones(1, 3, dtype=torch.bool), 0.0)
    assert trust.dtype == torch.float64
    assert trust.tolist() == [pytest.approx([1.0, 1.0, 0.5])]
    floored = prefix_trust(log(0.1, 0.1, 0.1), log(0.5, 0.5, 0.5), torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert floored.tolist() == [pytest.approx([1.0, 0.2, 0.1])]  # .04 is below the floor


def test_prefix_trust_skips_holes_and_padding() -> None:
    nan = math.nan
    sampled, largest = log(nan, 0.3, nan, 0.3, 0.3, nan), log(nan, 0.6, nan, 0.6, 0.6, nan)
    mask = torch.tensor([[False, True, False, True, True, False]])
    assert prefix_trust(sampled, largest, mask, 0.1).tolist() == [pytest.approx([0.0, 1.0, 0.0, 0.5, 0.25, 0.0])]


def test_prefix_trust_clamps_each_step() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    # an impossible token counts as exp(-50), and a token above the maximum (another kernel's rounding) as 1
    trust = prefix_trust(torch.tensor([[-1e4, -1e4, 0.0]]), torch.zeros(1, 3), mask, 0.0)
    assert trust[0].tolist() == pytest.approx([1.0, math.exp(-50), math.exp(-100)], rel=1e-12, abs=0)
    assert prefix_trust(torch.full((1, 3), -0.9), torch.full((1, 3), -1.0), mask, 0.0).tolist() == [[1.0, 1.0, 1.0]]


def test_prefix_trust_is_detached_and_refuses_wrong_input() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs = torch.zeros(1, 2, requires_grad=True)
    assert not prefix_trust(logprobs, logprobs, mask, 0.0).requires_grad
    with pytest.raises(InputError, match="teacher_max_logprobs must be finite"):
        prefix_trust(torch.zeros(1, 2), torch.tensor([[0.0, NAN]]), mask, 0.0)
    with pytest.raises(InputError, match="floor"):
        prefix_trust(torch.zeros(1, 2), torch.zeros(1, 2), mask, 1.5)
