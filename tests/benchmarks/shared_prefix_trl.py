"""One measurement of `shared_prefix.py` in a process of its own: steps of TRL's DistillationTrainer.

    .venv-trl/bin/python tests/benchmarks/shared_prefix_trl.py MODELS PROMPT G R REPEATS

Runs in an environment without this project (`trl_environment.py`). MODELS and PROMPT are folders as
`shared_prefix_inputs.py` writes them; G responses of R tokens a
step, REPEATS steps; what was measured is printed as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from shared_prefix_clock import Clock
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    TrainerCallback,
)
from trl import DistillationConfig, DistillationTrainer

LEARNING_RATE = 1e-6


class Stopwatch(TrainerCallback):
    """Ends a step of the clock with every optimizer step, and training when there are enough."""

    def __init__(self, clock: Clock) -> None:
        """Keep the clock."""
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin the first step."""
        self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a step and begin the next one, its batch included."""
        control.should_training_stop = not self._clock.stop()
        self._clock.start()


def main() -> None:
    """Measure one prompt's G responses of R tokens."""
    models, prompt = (Path(argument) for argument in sys.argv[1:3])
    num_responses, length, repeats = (int(argument) for argument in sys.argv[3:])
    torch.set_num_threads(1)
    described = json.loads((prompt / "prompt.json").read_text())
    student, teacher = (_model(models / name) for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    # The models' folders have no video processor, without which the full processor does not load by itself.
    processor = Qwen3VLProcessor(
        AutoImageProcessor.from_pretrained(models / "student"),
        tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
    clock = Clock(repeats)
    lengths: set[int] = set()
    generate = clock.part("generation", student.generate)

    def counted(**inputs: Any) -> Any:
        found = generate(**inputs)
        prompt_length = inputs["input_ids"].shape[1]
        lengths.update({prompt_length, found.shape[1] - prompt_length})
        assert len(found) == num_responses
        return found

    student.generate = counted
    teacher.base_model.forward = clock.part("teacher", teacher.base_model.forward)
    question = {"role": "user", "content": described["questions"]["none"]}
    rows = {
        "prompt": [[question]] * num_responses * (1 + repeats),
        "images": [[str(prompt / "full.png")]] * num_responses * (1 + repeats),
    }
    others = sorted(set(range(student.config.get_text_config().vocab_size)) - set(described["ordinary_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            # Both compute nothing twice.
            gradient_checkpointing=False,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=num_responses,
            max_steps=1 + repeats,
            max_completion_length=length,
            # A sampled image token would be taken for an image.
            generation_kwargs={"min_new_tokens": length, "suppress_tokens": others},
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student,
            teacher,
            args=config,
            train_dataset=Dataset.from_dict(rows).cast_column("images", [Image()]),
            processing_class=processor,
            callbacks=[Stopwatch(clock)],
        )
        trainer.train()
    print(json.dumps({**clock.result(), "lengths": sorted(lengths)}))


def _model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


if __name__ == "__main__":
    main()
