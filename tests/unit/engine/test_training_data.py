"""How a round is cut: into mini-batches, which change the result, and forward batches, which must not."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.training import OPTIMIZER, TrainingWorld

from tasks.adapters.prompts import signature
from tasks.adapters.training_data import (
    TrainingPrompt,
    TrainingRow,
    TrainJob,
    micro_batches,
    mini_batches,
    read_training_rows,
)

PROMPT_LENGTHS = {"a": 10, "b": 10, "c": 14, "d": 10, "e": 14}


def row(sample_id: str, length: int) -> TrainingRow:
    zeros = (0.0,) * length
    return TrainingRow(
        sample_id=sample_id,
        prompt=TrainingPrompt(lambda: {"input_ids": torch.zeros(1, PROMPT_LENGTHS[sample_id], dtype=torch.int64)}),
        token_ids=(1,) * length,
        sampler_logprobs=zeros,
        teacher_logprobs=zeros,
        topk_ids=(),
        topk_logprobs=(),
        weights=(1.0,),
    )


ROWS = [row(name, 1 + (3 * number + index) % 7) for number, name in enumerate(PROMPT_LENGTHS) for index in range(3)]
# A group that lost a response cannot be stacked with whole ones.
ROWS.pop()


def job(seed: int = 0, round: int = 1, parts: int = 2) -> TrainJob:
    optimizer = OPTIMIZER.model_copy(update={"mini_batches": parts})
    return TrainJob.model_construct(seed=seed, round=round, optimizer=optimizer)


def names(rows: Sequence[TrainingRow], batch: Sequence[int]) -> list[str]:
    return [rows[index].sample_id for index in batch]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_mini_batches_hold_every_response_once_in_whole_groups(parts: int) -> None:
    batches = mini_batches(ROWS, job(parts=parts), 0)
    assert len(batches) == min(parts, len(PROMPT_LENGTHS))
    assert sorted(chain(*batches)) == list(range(len(ROWS)))
    groups = [{*names(ROWS, batch)} for batch in batches]
    assert sum(len(group) for group in groups) == len(PROMPT_LENGTHS)
    assert max(len(group) for group in groups) - min(len(group) for group in groups) <= 1


def test_mini_batches_depend_on_seed_round_and_epoch_alone() -> None:
    def groups(rows: Sequence[TrainingRow], asked: TrainJob, epoch: int) -> list[list[str]]:
        return [list(dict.fromkeys(names(rows, batch))) for batch in mini_batches(rows, asked, epoch)]

    first = groups(ROWS, job(), 0)
    assert groups(ROWS, job(), 0) == groups(ROWS[::-1], job(), 0) == first
    for other in (
        [groups(ROWS, job(seed=seed), 0) for seed in range(5)],
        [groups(ROWS, job(round=round), 0) for round in range(5)],
        [groups(ROWS, job(), epoch) for epoch in range(5)],
    ):
        assert any(batches != first for batches in other)


def cost(batch: Sequence[int], shared: bool) -> int:
    prompts = names(ROWS, batch)
    longest = max(len(ROWS[index].token_ids) for index in batch)
    return sum(PROMPT_LENGTHS[name] for name in (set(prompts) if shared else prompts)) + len(batch) * longest


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("budget", [1, 17, 24, 31, 50, 89, 90, 1000])
def test_forward_batches_hold_every_response_once_within_the_budget(budget: int, shared: bool) -> None:
    indices = [index for index in range(len(ROWS)) if ROWS[index].sample_id != "b"]
    batches = micro_batches(ROWS, indices, budget, shared=shared)
    assert sorted(chain(*batches)) == indices
    for batch in batches:
        assert len({signature(ROWS[index].prompt.inputs) for index in batch}) == 1
        groups = [names(ROWS, batch).count(name) for name in dict.fromkeys(names(ROWS, batch))]
        assert len(set(groups)) == 1
        # Responses of one prompt stand together, as the forward pass takes them.
        assert names(ROWS, batch) == sorted(names(ROWS, batch))
        assert cost(batch, shared) <= budget or len(batch) == 1


@pytest.mark.parametrize(
    ("shared", "budget", "cut"),
    [
        # Groups a and d stack: two prompts of 10 and 6 responses of 5 tokens. c and the incomplete e stand alone.
        (True, 50, ["aaaddd", "ccc", "ee"]),
        (True, 49, ["aaa", "ddd", "ccc", "ee"]),
        # c: one prompt of 14 with 3 responses of 7, 6 and 2 tokens; the first and the third make 14 + 2 * 7.
        (True, 34, ["aaa", "ddd", "cc", "c", "ee"]),
        (False, 90, ["aaaddd", "ccc", "ee"]),
        (False, 89, ["aaa", "ddd", "ccc", "ee"]),
    ],
)
def test_groups_are_cut_only_where_the_budget_asks_for_it(shared: bool, budget: int, cut: list[str]) -> None:
    indices = [index for index in range(len(ROWS)) if ROWS[index].sample_id != "b"]
    batches = micro_batches(ROWS, indices, budget, shared=shared)
    assert sorted("".join(names(ROWS, batch)) for batch in batches) == sorted(cut)


def test_rows_join_what_belongs_together(world: TrainingWorld) -> None:
    asked = world.job(weights="token")
    rows = read_training_rows(asked, world.store, world.dataset, world.processor)
    assert names(rows, range(len(rows))) == ["a"] * 3 + ["b"] * 2 + ["c"] * 3 + ["d"] * 3
    for item in rows:
        assert len(item.token_ids) == len(item.teacher_logprobs) == len(item.weights) == len(item.topk_ids)
        # The sampled token's log-prob and its place among the likeliest tell whether the join is right.
        for token, logprob, ids, values in zip(
            item.token_ids, item.teacher_logprobs, item.topk_ids, item.topk_logprobs, strict=True
        ):
            assert logprob <= values[0]
            if token in ids:
                assert values[ids.index(token)] == logprob
    assert len({id(item.prompt.inputs) for item in rows}) == 4


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4),
    budget=st.integers(1, 60),
    shared=st.booleans(),
)
@example(lengths=[[9, 1, 1] * 3, [1, 1, 1]], budget=37, shared=True)
def test_prompts_of_a_forward_batch_have_equally_many_responses(
    lengths: list[list[int]], budget: int, shared: bool
) -> None:
    """The forward pass deals a batch's responses out to its prompts evenly."""
    rows = [row("abde"[group], length) for group, own in enumerate(lengths) for length in own]
    batches = micro_batches(rows, range(len(rows)), budget, shared=shared)
    assert sorted(chain(*batches)) == list(range(len(rows)))
    for batch in batches:
        assert len(set(Counter(names(rows, batch)).values())) == 1
