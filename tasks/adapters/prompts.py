"""Prompts as the model sees them: rendered text, token ids with expanded image tokens, pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tasks.adapters.models import load_processor
from tasks.config import PromptConfig
from tasks.ports import Prompt
from vzero_core.errors import InputError
from vzero_core.views import Size

_QUESTION = "\ue000"
"""Stands for a question: a character that no text uses."""
ModelInputs = dict[str, torch.Tensor]
"""Keyword arguments of a model's forward for one prompt; the first dimension counts prompts, images or patches."""


class PromptProcessor:
    """Renders and encodes prompts for one model."""

    def __init__(self, folder: Path) -> None:
        """Load the processor of a model folder."""
        self._processor = load_processor(folder)
        self.tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        self._refusals: dict[Size, str | None] = {}
        self._texts: dict[int, str] = {}

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Give the text of each token, as far as it has one of its own."""
        for token in set(token_ids) - self._texts.keys():
            self._texts[token] = str(self.tokenizer.decode([token]))
        return [self._texts[token] for token in token_ids]

    def special_tokens(self) -> set[str]:
        """Give the texts that are special tokens; within a question they would change the prompt's structure."""
        added = self.tokenizer.added_tokens_decoder.values()
        return {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)

    def render(self, question: str, num_images: int, config: PromptConfig) -> str:
        """Render a question with its images before it through the chat template.

        Args:
            question: fills the template's {question}.
            num_images: 1 for the full image alone, 2 with a crop after it.
            config: system message, template and chat-template arguments.
        """
        text = config.template.replace("{question}", question)
        content: list[dict[str, Any]] = [{"type": "image"} for _ in range(num_images)]
        content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if config.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": config.system}]})
        rendered: str = self._processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=config.enable_thinking,
            **config.chat_template_args,
        )
        return rendered

    def prompt(self, question: str, images: Sequence[Image.Image], config: PromptConfig) -> Prompt:
        """Render a question with its images as a prompt."""
        return Prompt(text=self.render(question, len(images), config), images=tuple(images))

    def refusal(self, size: Size) -> str | None:
        """Say why the model takes no image of a size, such as one far longer than wide; None where it does."""
        if size not in self._refusals:
            self._refusals[size] = None
            if hasattr(self._processor, "_get_num_multimodal_tokens"):
                try:
                    self._processor._get_num_multimodal_tokens(image_sizes=[[size.height, size.width]])
                except ValueError as error:
                    self._refusals[size] = str(error)
        return self._refusals[size]

    def lengths(
        self, questions: Sequence[str], sizes: Sequence[Sequence[Size]], config: PromptConfig
    ) -> list[int] | None:
        """Give the number of tokens of prompts, visual ones included, without touching a pixel.

        Args:
            questions: one a prompt.
            sizes: the sizes of each prompt's images, in pixels; none that the model refuses (`refusal`).
            config: as for `render`.

        Returns:
            One number a prompt; None where the model's processor cannot tell from the size alone.
        """
        if not hasattr(self._processor, "_get_num_multimodal_tokens"):
            return None
        if not questions:
            return []
        distinct = sorted({size for images in sizes for size in images})
        counted = self._processor._get_num_multimodal_tokens(
            image_sizes=[[size.height, size.width] for size in distinct]
        )
        visual = dict(zip(distinct, counted["num_image_tokens"], strict=True))
        # Rendered once and filled in: a chat template takes half a millisecond, and looks at roles, not at words.
        rendered = {number: self.render(_QUESTION, number, config) for number in {len(images) for images in sizes}}
        texts = [
            rendered[len(images)].replace(_QUESTION, question)
            for question, images in zip(questions, sizes, strict=True)
        ]
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        # Each image has one placeholder in the text, in whose place its visual tokens stand.
        return [len(ids) + sum(visual[size] - 1 for size in images) for ids, images in zip(tokens, sizes, strict=True)]

    @property
    def image_id(self) -> int:
        """The token that stands for an image in a prompt's text."""
        return int(self._processor.image_token_id)

    def placeholders(self, prompt: Prompt) -> tuple[list[int], int]:
        """Give a prompt's token ids with one placeholder per image, and their number once images are expanded.

        Raises:
            InputError: the text has another number of image placeholders than the prompt has images.
        """
        token_ids: list[int] = self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        if (number := token_ids.count(self.image_id)) != len(prompt.images):
            raise InputError(
                f"prompt must have one image placeholder per image ({len(prompt.images)} images), got {number}; "
                "check prompt.system, prompt.template and the question for image tokens"
            )
        if not hasattr(self._processor, "_get_num_multimodal_tokens"):
            return token_ids, num_tokens(self.encode(prompt))
        sizes = [[image.height, image.width] for image in prompt.images]
        visual = self._processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        return token_ids, len(token_ids) - len(sizes) + sum(visual)

    def encode(self, prompt: Prompt) -> ModelInputs:
        """Turn a prompt into a model's inputs, batch size 1.

        Raises:
            InputError: the text has another number of image placeholders than the prompt has images.
        """
        try:
            encoded = self._processor(
                text=[prompt.text], images=[list(prompt.images)], return_tensors="pt", add_special_tokens=False
            )
        except ValueError as error:
            raise InputError(
                f"prompt must have one image placeholder per image ({len(prompt.images)} images), but the processor "
                f"says: {error}; check prompt.system, prompt.template and the question for image tokens"
            ) from error
        # One prompt has no padding, and a mask of ones would only cost time.
        return {name: torch.as_tensor(value) for name, value in encoded.items() if name != "attention_mask"}


def signature(inputs: ModelInputs) -> tuple[tuple[str, torch.Size], ...]:
    """Give what must be equal in inputs that are stacked: all dimensions but the first."""
    return tuple((name, tensor.shape[1:]) for name, tensor in sorted(inputs.items()))


def stack(inputs: Sequence[ModelInputs]) -> ModelInputs:
    """Stack inputs of equal signature to a batch, without any padding."""
    return {name: torch.cat([item[name] for item in inputs]) for name in inputs[0]}


def num_tokens(inputs: ModelInputs) -> int:
    """Give the number of tokens of one encoded prompt, visual ones included."""
    return inputs["input_ids"].shape[1]


def end_of_turn_ids(generation_config: object, processor: PromptProcessor) -> tuple[int, ...]:
    """Give the tokens that end a response: the generation config's, else the tokenizer's."""
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is None:
        configured = processor.tokenizer.eos_token_id
    if configured is None:
        raise InputError("model must have an end-of-turn token, but neither generation config nor tokenizer names one")
    return tuple(configured) if isinstance(configured, list | tuple) else (int(configured),)


def banned_ids(config: PreTrainedConfig, processor: PromptProcessor, eos_ids: Sequence[int]) -> list[int]:
    """Give the tokens that may not stand in a response: special ones but end-of-turn, and rows without a token."""
    tokenizer = processor.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if (index := getattr(config, name, None)) is not None:
            special.add(index)
    rows = set(range(config.get_text_config().vocab_size))
    special |= rows - set(tokenizer.get_vocab().values())
    return sorted((special & rows) - set(eos_ids))
