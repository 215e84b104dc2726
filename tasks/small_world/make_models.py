"""Make the small world's two models, with labels: `python -m tasks.small_world.make_models [--out DIR]`.

The student is stopped early: it has learned to see, hardly to search. The teacher goes on from there, first on more of
the same, then on crops, so that a crop that shows the target helps it and another one misleads it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
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
from tasks.small_world.scenes import SceneObject

SEED = 0
THREADS = 2
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
VIEW_SHARES = {"none": 0.2, "positive": 0.65, "negative": 0.15}

MODELS = Path(__file__).parent / "models"
Loss = Callable[[Qwen3VLForConditionalGeneration, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class Stage:
    """One training stage: its loss, how long the cosine schedule is, and where to stop."""

    name: str
    loss: Loss
    steps: int
    lr: float
    stop: int | None = None


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
        targets = _draw_targets(scenes, 1, rng)
        corners = np.array([positive_corner(target, rng) for target in targets])
        total = _alignment(model, pooled(encode(model, noisy_crops(scenes, corners))), crop_labels(targets))
        kept = round(images * picture_share)
        some = Scenes(scenes.details[:kept], scenes.objects[:kept])
        pictures = encode(model, noisy_pictures(some, FULL_SIGMA))
        return total + _alignment(model, pictures, cell_labels(some.objects))

    return loss


def answer_on_pictures(images: int) -> Loss:
    """Answer several questions about each picture, with some alignment."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        scenes = draw_scenes(images, rng)
        features = encode(model, noisy_pictures(scenes, FULL_SIGMA))
        rows = torch.arange(images).repeat_interleave(TURNS)
        answered = language_loss(model, _draw_targets(scenes, TURNS, rng), [gather(features, rows)])
        return answered + ALIGNMENT_WEIGHT * _alignment(model, features, cell_labels(scenes.objects))

    return loss


def answer_with_crops(images: int) -> Loss:
    """Answer one question an image: without a crop, with a positive one, with a negative one."""

    def loss(model: Qwen3VLForConditionalGeneration, rng: np.random.Generator) -> torch.Tensor:
        total = torch.zeros(())
        for view, share in VIEW_SHARES.items():
            scenes = draw_scenes(round(images * share), rng)
            targets = _draw_targets(scenes, 1, rng)
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


def _draw_targets(scenes: Scenes, turns: int, rng: np.random.Generator) -> list[SceneObject]:
    return [items[k] for items in scenes.objects for k in rng.permutation(len(items))[:turns]]


SEE = Stage("see", align_pictures(32), steps=400, lr=3e-3)
ANSWER = Stage("answer", answer_on_pictures(32), steps=450, lr=1e-3)
STUDENT_STEP = 350
TEACHER = (
    Stage("see more", align_pictures(32), steps=200, lr=2e-3),
    Stage("answer more", answer_on_pictures(32), steps=300, lr=1e-3),
    Stage("see crops", align_crops(96, picture_share=1 / 6), steps=400, lr=2e-3),
    Stage("answer with crops", answer_with_crops(48), steps=250, lr=1.2e-3),
)


def run(stage: Stage, model: Qwen3VLForConditionalGeneration, seed: int, stops: tuple[int, ...] = ()) -> Iterator[int]:
    """Train in place through one stage, giving control back after each step named in `stops`, and at the end."""
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
        if step in stops:
            yield step
    yield stage.steps


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
    for _ in run(SEE, model, seed + 1):
        pass
    for step in run(ANSWER, model, seed + 2, stops=(STUDENT_STEP,)):
        if step == STUDENT_STEP:
            student = copy.deepcopy(model)
    for number, stage in enumerate(TEACHER):
        for _ in run(stage, model, seed + 3 + number):
            pass
    measured = {}
    for name, made in (("student", student), ("teacher", model)):
        save_model(made.eval(), out / name)
        views = VIEWS if name == "teacher" else ("none",)
        measured[name] = {view: accuracy(made, view, EVAL_QUESTIONS) for view in views}
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
