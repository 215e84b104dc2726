"""One measurement of `shared_prefix.py` in a process of its own: a step of ours, or of the plain way in transformers.

    python tests/benchmarks/shared_prefix_steps.py MODELS PROMPT STEP REPEATS RESULTS

MODELS and PROMPT are folders as `shared_prefix_inputs.py` writes them. What was measured is printed as JSON; what the
first step gave, log-probs or gradients, is written to RESULTS.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from shared_prefix_clock import Clock
from torch import Tensor
from transformers import PreTrainedModel

from tasks.adapters.models import load_model
from tasks.adapters.output_layer import score_tokens
from tasks.adapters.packed import enable_packing, packed_hidden
from tasks.adapters.prompts import ModelInputs, PromptProcessor, stack
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.config import PromptConfig
from tasks.ports import ReplayRequest, SamplingRequest
from vzero_core.config import PolicyGradientLoss
from vzero_core.losses import gated_distillation_loss

G, R = 8, 128
"""Responses, and tokens of each."""
LEARNING_RATE = 1e-6
ALL_TOKENS = 2**20
"""No batch is cut for its size."""
Step = Callable[[], dict[str, Tensor]]


class Steps:
    """What is measured: each method gives a step, which gives its results by name."""

    def __init__(self, models: Path, folder: Path, repeats: int) -> None:
        """Read the prompts: without a crop, and with one of either view."""
        self.clock = Clock(repeats)
        self._models = models
        self._processor = PromptProcessor(models / "student")
        full, *crops = (Image.open(folder / f"{name}.png").convert("RGB") for name in ("full", "positive", "negative"))
        described = json.loads((folder / "prompt.json").read_text())
        questions = described["questions"]
        none = self._processor.prompt(questions["none"], [full], PromptConfig())
        views = [self._processor.prompt(questions["view"], [full, crop], PromptConfig()) for crop in crops]
        self._prompts = {"none": [none], "views": views}
        generator = torch.Generator().manual_seed(0)
        ordinary = torch.tensor(described["ordinary_ids"])
        self._responses = ordinary[torch.randint(len(ordinary), (G, R), generator=generator)]
        self._teacher_logprobs = torch.randn(G, R, generator=generator) - len(ordinary).bit_length()
        self._vision_gradient = 0.0

    def replay(self, name: str) -> Step:
        """Ours: log-probs of all responses under each prompt, [prompts, G, R], and plain tokens to computed ones."""
        engine, prompts = self._engine("teacher"), self._prompts[name]

        def step() -> dict[str, Tensor]:
            responses = tuple(tuple(row) for row in self._responses.tolist())
            found = engine.score([ReplayRequest(prompt, responses) for prompt in prompts], advance=lambda _: None)
            scores = [one for group in found for one in group]
            plain, ours = sum(one.num_tokens for one in scores), sum(one.num_computed_tokens for one in scores)
            logprobs = torch.stack([one.logprobs for one in scores])
            return {"logprobs": logprobs.view(len(prompts), G, R), "ideal": torch.tensor(plain / ours)}

        return step

    def replay_plain(self, name: str) -> Step:
        """The same by one batch of G whole rows for each prompt."""
        model = self._model("teacher")

        @torch.inference_mode()
        def step() -> dict[str, Tensor]:
            encoded = [self._processor.encode(prompt) for prompt in self._prompts[name]]
            return {"logprobs": torch.stack([_plain_logprobs(model, inputs, self._responses) for inputs in encoded])}

        return step

    def train(self, rows: str) -> Step:
        """Ours: one optimizer step on one prompt, the group cut in rows of so many responses; gives the gradients."""
        model = self._model("student")
        inputs = self._processor.encode(self._prompts["none"][0])
        enable_packing(model)
        weight = model.get_output_embeddings().weight

        def logprobs(responses: Tensor) -> Tensor:
            hidden = packed_hidden(model, [inputs], responses).flatten(0, 1)
            return score_tokens(hidden, weight, responses.flatten()).logprobs.view_as(responses)

        return self._training(model, int(rows), logprobs)

    def train_plain(self, rows: str) -> Step:
        """The same by batches of so many whole rows."""
        model = self._model("student")
        inputs = self._processor.encode(self._prompts["none"][0])
        return self._training(model, int(rows), lambda responses: _plain_logprobs(model, inputs, responses))

    def whole(self, name: str) -> Step:
        """Ours as TRL's step: sampling, the teacher's log-probs of what was sampled, an optimizer step on these."""
        engine = self._engine("student")
        sample = self.clock.part("generation", engine.sample)
        replay = self.clock.part("teacher", self.replay(name))
        train = self.clock.part("student", self.train(str(G)))

        def step() -> dict[str, Tensor]:
            request = SamplingRequest(self._prompts[name][0], tuple(range(G)))
            (found,) = sample([request], temperature=1.0, max_new_tokens=R, advance=lambda _: None)
            # One that ended early was computed to the end all the same.
            rows = [(*response.token_ids, *response.token_ids[:1] * R)[:R] for response in found]
            self._responses = torch.tensor(rows)
            self._teacher_logprobs = replay()["logprobs"][0]
            train()
            return {}

        return step

    def _training(self, model: PreTrainedModel, rows: int, logprobs: Callable[[Tensor], Tensor]) -> Step:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

        def step() -> dict[str, Tensor]:
            optimizer.zero_grad(set_to_none=True)
            for part, teacher in zip(self._responses.split(rows), self._teacher_logprobs.split(rows), strict=True):
                loss = gated_distillation_loss(
                    PolicyGradientLoss(),
                    policy_logprobs=logprobs(part),
                    teacher_logprobs=teacher,
                    response_mask=torch.ones_like(part, dtype=torch.bool),
                    weights=torch.ones(len(part)),
                    num_responses=G,
                    num_tokens=G * R,
                )
                loss.backward()
                # The backward pass ends with the vision tower's.
                self.clock.add("vision", time.process_time() - self._vision_gradient)
            optimizer.step()
            return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

        return step

    def _engine(self, name: str) -> TransformersEngine:
        options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_batch_tokens": ALL_TOKENS}
        engine = TransformersEngine(self._models / name, name, **options)
        self._time_vision(engine._model)
        return engine

    def _model(self, name: str) -> PreTrainedModel:
        model = load_model(self._models / name, "float32", "cpu")
        self._time_vision(model)
        return model

    def _time_vision(self, model: PreTrainedModel) -> None:
        tower: Any = model.get_submodule("model.visual")
        forward = self.clock.part("vision", tower.forward)

        def noted(_: Tensor) -> None:
            self._vision_gradient = time.process_time()

        def hooked(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            if output.pooler_output.requires_grad:
                output.pooler_output.register_hook(noted)
            return output

        tower.forward = hooked


def _plain_logprobs(model: PreTrainedModel, prompt: ModelInputs, responses: Tensor) -> Tensor:
    """Log-probs of one prompt's responses as transformers gives them, positions included: [G, R]."""
    inputs = stack([prompt] * len(responses))
    types = inputs["mm_token_type_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], responses], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(responses, dtype=types.dtype)], dim=1)
    mask = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs, attention_mask=mask, use_cache=False, logits_to_keep=R + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0]


def main() -> None:
    """Measure what the arguments name."""
    models, prompt, name, repeats, results = sys.argv[1:]
    torch.set_num_threads(1)
    steps = Steps(Path(models), Path(prompt), int(repeats))
    kind, argument = name.split("-")
    step: Step = getattr(steps, kind)(argument)
    steps.clock.start()
    found = step()
    again = steps.clock.stop()
    save_file(found, results)
    while again:
        steps.clock.start()
        step()
        again = steps.clock.stop()
    print(json.dumps(steps.clock.result()))


if __name__ == "__main__":
    main()
