"""Hugging Face model folders: identity, weights and processor, loaded without remote code."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tasks.adapters.store import sha256_file
from tasks.artifacts import digest_bytes, digest_json
from tasks.config import EMBEDDED
from vzero_core.errors import InputError

CONFIG_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model"})
"""Files of a model folder beside its weights: configuration, tokenizer, processor; nothing that can run code."""
_EMBEDDED_MODELS = Path(__file__).parents[1] / "small_world" / "models"

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def model_folder(path: str) -> Path:
    """Give the local folder of a configured model path.

    Raises:
        InputError: there is no such folder, or it is no model folder.
    """
    if path.startswith(EMBEDDED):
        folder = _EMBEDDED_MODELS / path.removeprefix(EMBEDDED)
        if not folder.is_dir():
            known = ", ".join(
                f"{EMBEDDED}{entry.name}" for entry in sorted(_EMBEDDED_MODELS.iterdir()) if entry.is_dir()
            )
            raise InputError(f"model path must be a folder or one of {known}, got {path!r}; choose one of them")
        return folder
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"model path must be a local folder, got {path!r}, which is none; download the model there")
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {path} must have a config.json; it has none")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"model folder {path} must have weights as *.safetensors; it has none: convert them")
    return folder


def model_digest(folder: Path, memory: Path) -> str:
    """Give the identity of a model: the hash of its files' names and contents.

    Args:
        folder: the model folder.
        memory: JSON file in which the hashes of large files are remembered by path, size and time of change.
    """
    remembered: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
    entries = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in CONFIG_SUFFIXES | {".safetensors"}:
            continue
        stat = path.stat()
        token = digest_json([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        if token not in remembered:
            remembered[token] = sha256_file(path)
        entries.append([path.name, remembered[token]])
    memory.parent.mkdir(parents=True, exist_ok=True)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(remembered, indent=1, sort_keys=True))
    partial.replace(memory)
    return digest_json(entries)


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Give the identity of weights in memory: hash of the parameters' and buffers' names, types and bytes."""
    state = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest_bytes(state.digest())


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Give the names and shapes of a model folder's tensors, read from the headers of its files.

    Raises:
        InputError: a file is damaged, or there is none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"model folder {folder} must have whole weights, but {error}; copy them again") from error
    if not shapes:
        raise InputError(f"model folder {folder} must have weights as *.safetensors; it has none: convert them")
    return shapes


def dropped_tensors(config: PreTrainedConfig) -> re.Pattern[str]:
    """Give the names of tensors that a model's first folder may have, and a folder that transformers writes has not.

    These are what it passes over when it loads, such as heads for speculative decoding, and an output layer that shares
    its weights with the input embedding.
    """
    model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    names = list(model._keys_to_ignore_on_load_unexpected or [])
    if config.get_text_config().tie_word_embeddings or config.tie_word_embeddings:
        names += [f"^{re.escape(name)}$" for name in model._tied_weights_keys or []]
    # Nothing matches what matches nothing.
    return re.compile("|".join(f"(?:{name})" for name in names) or "(?!)")


def load_model(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a vision-language model for inference; safetensors only, no remote code.

    Raises:
        InputError: it is no image-text-to-text model, or its weights are damaged, incomplete or of other shapes.
    """
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (SafetensorError, OSError) as error:
        raise InputError(f"model folder {folder} must have whole weights, but {error}; copy them again") from error
    except ValueError as error:
        raise InputError(f"model folder {folder} must hold an image-text-to-text model, but {error}") from error
    model, info = loaded
    # Left alone, transformers fills what is missing with random numbers.
    bad = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if bad:
        raise InputError(
            f"model folder {folder} must have all weights in the shapes of its config.json, but {len(bad)} tensors "
            f"are missing or of other shapes: {', '.join(bad[:3])}; copy the weights and config.json again"
        )
    placed: PreTrainedModel = model.to(device).eval()
    return placed


class ComposedProcessor:
    """Image processor and tokenizer joined by expanding each image token.

    The full processor of the Qwen-VL families cannot be built where torchvision does not import, because their video
    processor needs it. This joins the other two parts as that processor does for images.
    """

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> None:
        """Join the parts.

        Args:
            image_processor: gives `image_grid_thw`, and has a `merge_size`.
            tokenizer: has the token `image_token_id`.
            image_token_id: the placeholder of one visual token.
        """
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self._image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        """Render messages with the tokenizer's chat template."""
        text = self.tokenizer.apply_chat_template(messages, **kwargs)
        assert isinstance(text, str)
        return text

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]]) -> dict[str, list[int]]:
        # Of the same name and form as in the full processors, which know it for servers that plan without pixels.
        patches = [self.image_processor.get_number_of_image_patches(*size) for size in image_sizes]
        return {"num_image_tokens": [count // self.image_processor.merge_size**2 for count in patches]}

    def __call__(self, *, text: list[str], images: list[Any], **_: Any) -> dict[str, torch.Tensor]:
        """Give the model's inputs for one prompt."""
        pixels = self.image_processor(images=images, return_tensors="pt")
        (prompt,) = text
        pieces = prompt.split(self._image_token)
        counts = pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        expanded = pieces[0] + "".join(
            self._image_token * int(count) + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        input_ids = torch.tensor([self.tokenizer(expanded, add_special_tokens=False)["input_ids"]])
        is_image: torch.Tensor = input_ids == self.image_token_id
        return {
            "input_ids": input_ids,
            "mm_token_type_ids": is_image.int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }


def load_processor(folder: Path) -> Any:
    """Load a model's processor: the full one where it loads, else its parts joined.

    Raises:
        InputError: the folder lacks a tokenizer, an image processor or a chat template, or they do not load.
    """
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise InputError(
            f"model folder {folder} must have a processor (preprocessor_config.json or processor_config.json); "
            "it has none: copy the processor's files of the original model there"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"model folder {folder} must have a tokenizer (tokenizer_config.json); it has none")
    try:
        processor = _any_processor(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model folder {folder} must have a processor that loads, but {error}") from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise InputError(
            f"model folder {folder} must have an image processor and a tokenizer, got {type(processor).__name__} "
            "alone; copy the processor's files of the original model there"
        )
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise InputError(f"model folder {folder} must have a chat template (chat_template.jinja); it has none")
    return processor


def _any_processor(folder: Path) -> Any:
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        return AutoProcessor.from_pretrained(folder, **options)
    except ImportError as error:
        # Raised where torchvision is missing, by the families whose video processor wants it.
        image_processor = AutoImageProcessor.from_pretrained(folder, **options)
        image_id = json.loads((folder / "config.json").read_text()).get("image_token_id")
        if image_id is None or not hasattr(image_processor, "merge_size"):
            raise InputError(
                f"model folder {folder} has a processor that needs more than is installed: {error}; only those of the "
                "Qwen-VL kind can be put together without it"
            ) from error
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return ComposedProcessor(image_processor, tokenizer, image_id)
