"""Labelled batches and losses from which the two starting models are made; V-Zero itself never comes here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tasks.small_world.models import EOS, IMAGE_PAD, MERGE, PATCH, TEMPORAL_PATCH, build_tokenizer
from tasks.small_world.scenes import (
    CELL,
    CELLS,
    COLOURS,
    DETAIL_SIGMA,
    DETAIL_SIZE,
    DIGITS,
    GRID,
    PICTURE_SIZE,
    SCALE,
    SHAPES,
    Pixels,
    SceneObject,
    ask,
    downsample,
    draw_objects,
    draw_window,
    render,
)

PIXEL_MIDDLE = 127.5
IGNORED = -100
# What visual tokens are to say.
WORD_GROUPS = (tuple(COLOURS), SHAPES, DIGITS, CELLS)
Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scenes:
    """Noise-free scenes of one batch: renderings [N, 128, 128, 3] and the objects of each."""

    details: Pixels
    objects: list[tuple[SceneObject, ...]]


@dataclass(frozen=True)
class Features:
    """Visual features of N images: last and deep-stacked ones, each [N, tokens, hidden]."""

    last: torch.Tensor
    deep: list[torch.Tensor]


def draw_scenes(count: int, rng: np.random.Generator) -> Scenes:
    """Draw scenes from a running generator; they are of no split of the dataset."""
    objects = [draw_objects(rng) for _ in range(count)]
    return Scenes(np.stack([render(items) for items in objects]), objects)


def noisy(pixels: npt.NDArray[np.generic], sigma: torch.Tensor) -> torch.Tensor:
    """Add noise of each image's sigma [N] and normalise as the image processor does: [N, 3, H, W]."""
    clean = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    noise = torch.randn(clean.shape) * sigma[:, None, None, None]
    return (clean + noise).round().clamp(0, 255) / PIXEL_MIDDLE - 1


def noisy_pictures(scenes: Scenes, sigma_range: tuple[float, float]) -> torch.Tensor:
    """Make the pictures of scenes, each with a sigma of its own: [N, 3, 64, 64]."""
    low, high = sigma_range
    return noisy(downsample(scenes.details), low + (high - low) * torch.rand(len(scenes.objects)))


def noisy_crops(scenes: Scenes, corners: Array) -> torch.Tensor:
    """Cut one window a scene at corners [N, 2] (left, top), with the detail's noise: [N, 3, 32, 32]."""
    windows = [d[top : top + CELL, left : left + CELL] for d, (left, top) in zip(scenes.details, corners, strict=True)]
    return noisy(np.stack(windows), torch.full((len(windows),), DETAIL_SIGMA))


def positive_corner(target: SceneObject, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the corner of a crop that shows the target."""
    return draw_window(target.cell, rng)


def negative_corner(positive: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Draw, uniformly, the corner of an equal window that does not meet the positive one."""
    limit = DETAIL_SIZE - CELL
    while True:
        left, top = (int(value) for value in rng.integers(0, limit + 1, size=2))
        if abs(left - positive[0]) >= CELL or abs(top - positive[1]) >= CELL:
            return left, top


def patchify(pixels: torch.Tensor) -> torch.Tensor:
    """Flatten [N, 3, H, W] to the image processor's patches, [N * H/8 * W/8, 384]."""
    number, channels, height, width = pixels.shape
    block = PATCH * MERGE
    patches = pixels.reshape(number, channels, height // block, MERGE, PATCH, width // block, MERGE, PATCH)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(-3)
    patches = patches.expand(*patches.shape[:-3], TEMPORAL_PATCH, PATCH, PATCH)
    return patches.reshape(-1, channels * TEMPORAL_PATCH * PATCH * PATCH)


def encode(model: Qwen3VLForConditionalGeneration, pixels: torch.Tensor) -> Features:
    """Run the vision tower on equal-sized images [N, 3, H, W]."""
    number, _, height, width = pixels.shape
    grid = torch.tensor([[1, height // PATCH, width // PATCH]]).expand(number, 3)
    output = model.model.get_image_features(patchify(pixels), grid, return_dict=True)
    return Features(torch.stack(output.pooler_output), [torch.stack(level) for level in output.deepstack_features])


def gather(features: Features, rows: torch.Tensor) -> Features:
    """Repeat images: one row of features for each index."""
    return Features(features.last[rows], [level[rows] for level in features.deep])


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def prompt_ids(question: str, image_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Render a question with the chat template and expand each image to its tokens, as inference does."""
    tokenizer = _tokenizer()
    content: list[Any] = [{"type": "image"} for _ in image_tokens] + [{"type": "text", "text": question}]
    messages: Any = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, *tails = str(text).split(IMAGE_PAD)
    text = head + "".join(IMAGE_PAD * number + tail for number, tail in zip(image_tokens, tails, strict=True))
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


@cache
def response_ids(trace: str) -> tuple[int, ...]:
    """Tokenise a trace and its end."""
    return tuple(_tokenizer()(trace + EOS, add_special_tokens=False).input_ids)


@cache
def _word_ids(words: tuple[str, ...]) -> torch.Tensor:
    return torch.tensor(_tokenizer().convert_tokens_to_ids(list(words)))


def logits_of(
    model: Qwen3VLForConditionalGeneration, ids: torch.Tensor, views: list[Features], keep: int
) -> torch.Tensor:
    """Give the logits of the last `keep` positions for rows [B, L] of one layout, from ready visual features."""
    config = model.config
    grids = [[1, side * MERGE, side * MERGE] for side in (round(view.last.shape[1] ** 0.5) for view in views)]
    row = ids[:1]
    positions, _ = model.model.get_rope_index(
        row, mm_token_type_ids=(row == config.image_token_id).int(), image_grid_thw=torch.tensor(grids)
    )
    merged = Features(
        torch.cat([view.last for view in views], 1),
        [torch.cat(levels, 1) for levels in zip(*(view.deep for view in views), strict=True)],
    )
    # The class says one tensor, the model takes one per image.
    pictures: Any = list(merged.last)
    levels: Any = [list(level) for level in merged.deep]
    output = model(
        input_ids=ids,
        position_ids=positions.expand(3, len(ids), -1),
        mm_encoder_outputs={
            "image": BaseModelOutputWithDeepstackFeatures(pooler_output=pictures, deepstack_features=levels)
        },
        use_cache=False,
        logits_to_keep=keep,
    )
    logits: torch.Tensor = output.logits
    return logits


def language_loss(
    model: Qwen3VLForConditionalGeneration, targets: list[SceneObject], views: list[Features]
) -> torch.Tensor:
    """Give the mean cross-entropy of the traces' tokens, one target and one set of views a row."""
    questions = [ask(target) for target in targets]
    image_tokens = tuple(view.last.shape[1] for view in views)
    prompts = torch.tensor([prompt_ids(question.text, image_tokens) for question in questions])
    responses = torch.tensor([response_ids(question.trace) for question in questions])
    length = responses.shape[1]
    logits = logits_of(model, torch.cat([prompts, responses[:, :-1]], 1), views, length)
    return cross_entropy(logits.flatten(0, 1), responses.flatten())


def cell_labels(objects: list[tuple[SceneObject, ...]]) -> torch.Tensor:
    """Label each cell with the words for what is in it, or IGNORED where it is empty: [N, cells, 4]."""
    labels = torch.full((len(objects), GRID**2, len(WORD_GROUPS)), IGNORED)
    for row, items in zip(labels, objects, strict=True):
        for item in items:
            row[item.cell] = torch.tensor([item.colour, item.shape, item.digit, item.cell])
    return labels


def crop_labels(targets: list[SceneObject]) -> torch.Tensor:
    """Label each positive crop with the words for its object; a crop does not show its cell: [N, 1, 3]."""
    return torch.tensor([[[target.colour, target.shape, target.digit]] for target in targets])


def pooled(features: Features) -> Features:
    """Average the visual tokens of each image: together they are to say what a crop shows, [N, 1, hidden]."""
    return Features(features.last.mean(1, keepdim=True), [level.mean(1, keepdim=True) for level in features.deep])


def alignment(
    model: Qwen3VLForConditionalGeneration, features: Features, labels: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Compare visual tokens with word embeddings: summed cross-entropy within each group of words.

    Args:
        model: whose word embeddings are the classifier.
        features: of N images.
        labels: [N, tokens, groups]; indices into the first WORD_GROUPS, or IGNORED.

    Returns:
        The loss, and the accuracy in each group.
    """
    words = cast(torch.Tensor, model.get_input_embeddings().weight)
    used = labels[..., 0] != IGNORED
    tokens, wanted = features.last[used], labels[used]
    loss, accuracies = torch.zeros(()), []
    for group, target in zip(WORD_GROUPS, wanted.unbind(-1), strict=False):
        logits = tokens @ words[_word_ids(group)].T
        loss = loss + cross_entropy(logits, target)
        accuracies.append((logits.argmax(-1) == target).float().mean().item())
    return loss, accuracies


assert PICTURE_SIZE == GRID * PATCH * MERGE == DETAIL_SIZE // SCALE  # one visual token a cell
