"""Make the small world's two models, with labels: `python -m tasks.small_world.make_models [--out DIR]`.

The student learns to see everything, but to answer questions on a few colours only. The teacher goes on from there: to
all colours, then to crops, so that a crop that shows the target helps it and another one misleads it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from tasks.small_world.labelled import (
    Features,
    Scenes,
    alignment,
    cell_labels,
    crop_labels,
    draw_scenes,
    encode,
    gather,
    language_loss,
    negative_corner,
    noisy_crops,
    noisy_pictures,
    pooled,
    positive_corner,
)
from tasks.small_world.measure import VIEWS, accuracy
from tasks.small_world.models import build_config, initialise, save_model
from tasks.small_world.scenes import COLOURS, SceneObject

SEED = 0
# The matrices are too small for a second thread to help.
THREADS = 1
WARM_UP_STEPS = 30
FINAL_LR_SHARE = 0.05
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
REPORT_EVERY = 50
EVAL_QUESTIONS = 1000
ALIGNMENT_WEIGHT = 0.2
FULL_SIGMA = (25.0, 110.0)
# When a crop is shown, the picture is made hard to read, or the teacher would ignore the crop.
HARD_SIGMA = (80.0, 250.0)
TURNS = 4
# The student is never asked about the other colours: this is the search that V-Zero has to teach it.
KNOWN_COLOURS = frozenset(range(4))
ALL_COLOURS = frozenset(range(len(COLOURS)))
VIEW_SHARES = {"none": 0.2, "positive": 0.65, "negative": 0.15}

MODELS = Path(__file__).parent / "models"
Loss = Callable[[Qwen3VLForConditionalGeneration, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One training stage: its loss, and the length and peak of its learning-rate schedule."""

    name: str
    loss: Loss
    steps: int
    lr: float


def align_pictures(images: int) -> Loss:
    """Make each visual token of a picture resemble the words for its cell."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        scenes = draw_scenes(images, rng)
        return _alignment(model, encode(model, noisy_pictures(scenes, FULL_SIGMA)), cell_labels(scenes.objects))

    return loss


def align_crops(images: int, picture_share: float) -> Loss:
    """Make each visual token of a positive crop resemble the words for its object; keep some pictures in the mix."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        scenes = draw_scenes(images, rng)
        targets = _draw_targets(scenes, rng)
        corners = np.array([positive_corner(target, rng) for target in targets])
        total = _alignment(model, pooled(encode(model, noisy_crops(scenes, corners))), crop_labels(targets))
        kept = round(images * picture_share)
        some = Scenes(scenes.details[:kept], scenes.objects[:kept])
        pictures = encode(model, noisy_pictures(some, FULL_SIGMA))
        return total + _alignment(model, pictures, cell_labels(some.objects))

    return loss


def answer_on_pictures(images: int, colours: frozenset[int]) -> Loss:
    """Answer several questions about each picture, all on objects of certain colours, with some alignment."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        scenes = draw_scenes(images, rng)
        features = encode(model, noisy_pictures(scenes, FULL_SIGMA))
        asked = [
            (row, items[k])
            for row, items in enumerate(scenes.objects)
            for k in [k for k in rng.permutation(len(items)) if items[k].colour in colours][:TURNS]
        ]
        rows = torch.tensor([row for row, _ in asked])
        answered = language_loss(model, [target for _, target in asked], [gather(features, rows)])
        return answered + ALIGNMENT_WEIGHT * _alignment(model, features, cell_labels(scenes.objects))

    return loss


def answer_with_crops(images: int) -> Loss:
    """Answer one question an image: without a crop, with a positive one, with a negative one."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        total = torch.zeros(())
        for view, share in VIEW_SHARES.items():
            scenes = draw_scenes(round(images * share), rng)
            targets = _draw_targets(scenes, rng)
            sigma = FULL_SIGMA if view == "none" else HARD_SIGMA
            views = [encode(model, noisy_pictures(scenes, sigma))]
            if view != "none":
                corners = [positive_corner(target, rng) for target in targets]
                if view == "negative":
                    corners = [negative_corner(corner, rng) for corner in corners]
                views.append(encode(model, noisy_crops(scenes, np.array(corners))))
                if view == "positive":
                    total = total + ALIGNMENT_WEIGHT * share * _alignment(model, pooled(views[1]), crop_labels(targets))
            total = total + share * language_loss(model, targets, views)
        return total

    return loss


def _alignment(model: Qwen3VLForConditionalGeneration, features: Features, labels: torch.Tensor) -> torch.Tensor:
    return alignment(model, features, labels)[0]


def _draw_targets(scenes: Scenes, rng: np.random.Generator) -> list[SceneObject]:
    return [items[int(rng.integers(len(items)))] for items in scenes.objects]


SHARED = (Stage("see", align_pictures(32), steps=400, lr=3e-3),)
STUDENT = (Stage("answer on some colours", answer_on_pictures(32, KNOWN_COLOURS), steps=350, lr=1e-3),)
TEACHER = (
    Stage("answer on all colours", answer_on_pictures(32, ALL_COLOURS), steps=150, lr=1e-3),
    Stage("see crops", align_crops(96, picture_share=0.1), steps=800, lr=3e-3),
    Stage("answer with crops", answer_with_crops(48), steps=400, lr=1.2e-3),
)


def run(stage: Stage, model: Qwen3VLForConditionalGeneration, seed: int) -> None:
    """Train a model in place through one stage."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    wall, cpu = time.perf_counter(), time.process_time()
    model.train()
    for step in range(1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * _schedule(step, stage.steps)
        loss = stage.loss(model, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        if step % REPORT_EVERY == 0 or step == stage.steps:
            spent = f"{time.perf_counter() - wall:.0f} s wall, {time.process_time() - cpu:.0f} s CPU"
            print(f"{stage.name}: step {step}/{stage.steps}, loss {loss.item():.3f}, {spent}", flush=True)


def _schedule(step: int, steps: int) -> float:
    warm_up = min(step / WARM_UP_STEPS, 1.0)
    cosine = 0.5 * (1 + np.cos(np.pi * step / steps))
    return float(warm_up * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine))


def make_models(out: Path, seed: int = SEED) -> dict[str, dict[str, float]]:
    """Train both models and save them under `out`.

    Args:
        out: folder that gets `student/` and `teacher/`.
        seed: of initialisation, scenes and noise.

    Returns:
        Accuracy of each model under each view, on the first held-out questions.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config())
    initialise(model)
    measured = {}
    stage_seed = seed
    for name, stages, views in (("student", SHARED + STUDENT, ("none",)), ("teacher", TEACHER, VIEWS)):
        for stage in stages:
            stage_seed += 1
            run(stage, model, stage_seed)
        save_model(model.eval(), out / name)
        measured[name] = {view: accuracy(model, view, EVAL_QUESTIONS) for view in views}
        print(name, {view: round(value, 3) for view, value in measured[name].items()}, flush=True)
    return measured


def main() -> None:
    """Make both models and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    wall, cpu = time.perf_counter(), time.process_time()
    make_models(arguments.out, arguments.seed)
    print(f"{time.perf_counter() - wall:.0f} s wall, {time.process_time() - cpu:.0f} s CPU")


if __name__ == "__main__":
    main()
