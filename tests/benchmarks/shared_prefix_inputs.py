"""What `shared_prefix.py` measures on: random models large enough for matrix products to dominate, and one prompt."""

import json
from pathlib import Path

import torch
from support.tiny_models import MERGE, PATCH, picture, save_tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from tasks.adapters.prompts import PromptProcessor, num_tokens
from tasks.config import PromptConfig

NUM_WORDS = 8000
HIDDEN, MLP, LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 256, 1024, 4, 4, 2, 64
VISION_HIDDEN, VISION_MLP, VISION_HEADS, VISION_DEPTH = 16, 32, 1, 1
INITIALIZER_RANGE = 0.05
"""Of 0.02 all tokens would be nearly equally likely, and any mistake nearly invisible."""
GRIDS = {256: (14, 14), 1024: (31, 31), 4096: (64, 63)}
"""Prompt tokens: how many of them are the image's, (rows, columns)."""
CROP = (4, 4)


def save_model(family: str, folder: Path, seed: int) -> None:
    """Write a random model, with the processor and the classes of the tests' tiny one."""
    save_tiny_model(family, folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([word(number) for number in range(NUM_WORDS)])
    tokenizer.save_pretrained(folder)
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    pixels["size"]["longest_edge"] = 2**20
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size = len(tokenizer), HIDDEN, MLP
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = LAYERS, HEADS, KEY_HEADS
    text.head_dim, text.max_position_embeddings, text.initializer_range = HEAD_DIM, 2**14, INITIALIZER_RANGE
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 8, 8]}
    if family == "qwen3_5":
        # One layer in four has full attention, as in the released models.
        text.layer_types = ["linear_attention"] * (LAYERS - 1) + ["full_attention"]
        text.linear_key_head_dim = text.linear_value_head_dim = HEAD_DIM
        text.linear_num_key_heads, text.linear_num_value_heads = KEY_HEADS, HEADS
    vision.hidden_size, vision.intermediate_size, vision.num_heads = VISION_HIDDEN, VISION_MLP, VISION_HEADS
    vision.depth, vision.out_hidden_size, vision.initializer_range = VISION_DEPTH, HIDDEN, INITIALIZER_RANGE
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def word(number: int) -> str:
    """Give a token of the tokenizer: one token in any text."""
    return f"[{number:04}]"


def save_prompt(models: Path, folder: Path, length: int) -> None:
    """Write a picture, two crops, and the questions that make prompts of so many tokens, with a crop and without."""
    folder.mkdir()
    processor = PromptProcessor(models / "student")
    images = []
    for name, (rows, columns) in {"full": GRIDS[length], "positive": CROP, "negative": CROP}.items():
        images.append(picture(columns * PATCH * MERGE, rows * PATCH * MERGE, seed=len(images)))
        images[-1].save(folder / f"{name}.png")
    questions = {}
    for name, shown in {"none": images[:1], "view": images[:2]}.items():
        others = num_tokens(processor.encode(processor.prompt("", shown, PromptConfig())))
        questions[name] = "".join(word(number) for number in range(length - others))
    ordinary = [processor.tokenizer.convert_tokens_to_ids(word(number)) for number in range(NUM_WORDS)]
    (folder / "prompt.json").write_text(json.dumps({"questions": questions, "ordinary_ids": ordinary}))
