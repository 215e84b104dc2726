"""Greedy accuracy of a small-world model on the held-out questions, under each view."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from tasks.small_world.dataset import EVAL_SEED, EVAL_SPLIT
from tasks.small_world.labelled import Features, encode, gather, logits_of, negative_corner, prompt_ids
from tasks.small_world.models import build_tokenizer
from tasks.small_world.scenes import CELL, SCALE, Pixels, Sample, generator, make_sample

VIEWS = ("none", "positive", "negative")
RESPONSE_TOKENS = 6
ANSWER_POSITION = 4
CELL_POSITION = 1
BATCH = 100
PIXEL_MIDDLE = 127.5


@lru_cache(maxsize=1)
def held_out(count: int) -> tuple[Sample, ...]:
    """Make the first held-out samples."""
    return tuple(make_sample(EVAL_SEED, EVAL_SPLIT, index) for index in range(count))


def crop(sample: Sample, index: int, view: str) -> Pixels:
    """Cut the positive or a negative crop of a sample, as the pipeline does."""
    left, top = (round(value * SCALE) for value in sample.region[:2])
    if view == "negative":
        left, top = negative_corner((left, top), generator(EVAL_SEED, EVAL_SPLIT, index, "negative"))
    return sample.detail[top : top + CELL, left : left + CELL]


@torch.no_grad()
def greedy(model: Qwen3VLForConditionalGeneration, view: str, count: int) -> list[list[str]]:
    """Answer the first held-out questions greedily, RESPONSE_TOKENS words each."""
    tokenizer = build_tokenizer()
    samples = held_out(count)
    answers: list[list[str]] = []
    model.eval()
    for start in range(0, count, BATCH):
        batch = samples[start : start + BATCH]
        views = [_encode(model, [sample.picture for sample in batch])]
        if view != "none":
            crops = [crop(sample, start + offset, view) for offset, sample in enumerate(batch)]
            views.append(_encode(model, crops))
        image_tokens = tuple(item.last.shape[1] for item in views)
        ids = torch.tensor([prompt_ids(sample.question.text, image_tokens) for sample in batch])
        prompt_length = ids.shape[1]
        for _ in range(RESPONSE_TOKENS):
            ids = torch.cat([ids, logits_of(model, ids, views, 1)[:, -1].argmax(-1, keepdim=True)], 1)
        answers += [[*tokenizer.convert_ids_to_tokens(row)] for row in ids[:, prompt_length:].tolist()]
    return answers


def accuracy(model: Qwen3VLForConditionalGeneration, view: str, count: int) -> float:
    """Give the share of the first held-out questions whose answer is exactly right."""
    answers = greedy(model, view, count)
    right = [words[ANSWER_POSITION] == s.question.answer for words, s in zip(answers, held_out(count), strict=True)]
    return float(np.mean(right))


def _encode(model: Qwen3VLForConditionalGeneration, images: list[Pixels]) -> Features:
    pixels = torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2)
    return gather(encode(model, pixels / PIXEL_MIDDLE - 1), torch.arange(len(images)))
