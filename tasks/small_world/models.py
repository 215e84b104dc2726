"""The two tiny models' configuration, tokenizer, image processor and initialisation; all classes are stock ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tasks.small_world.scenes import CELL, CELLS, COLOURS, DIGITS, PICTURE_SIZE, SHAPES

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (
    PAD, EOS, UNKNOWN, SYSTEM, USER, ASSISTANT, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD
)  # fmt: skip
WORDS = ("digit", "on", "the", "?", "answer", *COLOURS, *SHAPES, *DIGITS, *CELLS)

PATCH, MERGE, TEMPORAL_PATCH = 8, 2, 2
MAX_LENGTH = 256
HIDDEN, LAYERS, HEADS, HEAD_DIM, MLP = 96, 3, 3, 32, 192
VISION_HIDDEN, VISION_DEPTH, VISION_HEADS, VISION_MLP = 48, 2, 2, 96
ROPE_THETA = 1e5
# Of the HEAD_DIM / 2 frequencies: time (and text), height, width.
MROPE_SECTION = [6, 5, 5]
INITIALIZER_RANGE = 0.08
# With transformers' 0.02 the visual features never learn to line up with the words.
EMBEDDING_STD = 0.2
# Output projections start as this multiple of the transposed value projection.
MIMETIC_OUTPUT_SCALE = 0.5

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'system' and message.content -%}<|system|>
    {%- elif message.role == 'user' -%}<|user|>
    {%- elif message.role == 'assistant' -%}<|assistant|>
    {%- endif -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
            {%- elif part.type == 'text' -%}{{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}<eos>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: words are split at spaces, decoding joins them with spaces again."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Build the stock image processor: a picture gives 16 visual tokens, a crop of one cell 4, both unscaled."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL_PATCH,
        size={"shortest_edge": CELL**2, "longest_edge": PICTURE_SIZE**2},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_config() -> Qwen3VLConfig:
    """Build the configuration shared by student and teacher (under half a million parameters)."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    ends: dict[str, Any] = {"eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": MAX_LENGTH,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": MROPE_SECTION,
                "mrope_interleaved": True,
            },
            "pad_token_id": ids[PAD],
            "eos_token_id": ids[EOS],
            "bos_token_id": None,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": VISION_DEPTH,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_heads": VISION_HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL_PATCH,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": (PICTURE_SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [0],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        **ends,
    )


@torch.no_grad()
def initialise(model: Qwen3VLForConditionalGeneration) -> None:
    """Initialise a model in place, from torch's global random state.

    Attention starts "mimetic": keys equal queries, values are orthogonal and outputs undo them, so that every token
    starts by attending to what resembles it and by copying it. Without this no search emerges in a few hundred steps.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    language = model.model.language_model
    torch.nn.init.normal_(language.embed_tokens.weight, std=EMBEDDING_STD)
    for layer in language.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(MIMETIC_OUTPUT_SCALE * attention.v_proj.weight.T)
    model.tie_weights()


def save_model(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Save a model as a plain Hugging Face folder, which the Auto classes open."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2) + "\n", encoding="utf-8")
