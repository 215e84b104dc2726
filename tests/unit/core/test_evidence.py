import pytest
import torch

from vzero_core.errors import InputError
from vzero_core.evidence import evidence_scores

NAN = float("nan")
POS = torch.tensor([[-1.0, -2.0, -3.0]])
NEG = torch.tensor([[-2.0, -2.0, -1.0]])
MASK = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (1.0, -1 / 3),  # d = 1, 0, -2; mean -1/3
        (0.5, 0.0),  # e = 1, 0, -1
        (0.0, 1 / 3),  # e = 1, 0, 0
        (2.0, -1.0),  # e = 1, 0, -4
    ],
)
def test_golden(gamma: float, expected: float) -> None:
    scores = evidence_scores(POS, NEG, MASK, gamma)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([expected], abs=1e-15)


def test_every_token_counts_the_first_and_the_last_too() -> None:
    for position in range(3):
        pos = torch.zeros(1, 3)
        pos[0, position] = 3.0
        assert evidence_scores(pos, torch.zeros(1, 3), MASK).tolist() == [1.0]  # 3 nats over 3 tokens


def test_divides_by_the_responses_own_length_and_gives_an_empty_one_zero() -> None:
    pos = torch.tensor([[3.0, NAN, NAN], [3.0, 3.0, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    assert evidence_scores(pos, torch.zeros(3, 3), mask).tolist() == [3.0, 3.0, 0.0]


def test_is_detached_and_resolves_more_than_float32() -> None:
    pos = torch.tensor([[-1.0, -1e-9]], dtype=torch.float64, requires_grad=True)
    scores = evidence_scores(pos, torch.tensor([[-1.0, 0.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    assert not scores.requires_grad
    assert scores.item() == pytest.approx(-5e-10, rel=1e-9)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="teacher_logprobs_pos must be finite"):
        evidence_scores(torch.tensor([[NAN, 0.0, 0.0]]), NEG, MASK)
    with pytest.raises(InputError, match="teacher_logprobs_neg must be finite"):
        evidence_scores(POS, torch.tensor([[0.0, 0.0, -float("inf")]]), MASK)
    with pytest.raises(InputError, match="teacher_logprobs_neg must be of shape"):
        evidence_scores(POS, NEG[:, :2], MASK)
    with pytest.raises(InputError, match="bool"):
        evidence_scores(POS, NEG, MASK.long())
    for gamma in (-1.0, NAN, float("inf")):
        with pytest.raises(InputError, match="gamma"):
            evidence_scores(POS, NEG, MASK, gamma)
