"""Tiny random models of four families as plain Hugging Face folders; all classes are stock ones.

Two layers, a word- or character-level tokenizer with a chat template and the families' own image processors: they
answer nonsense, through every code path that the full-size models take.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.idefics3 import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer
from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "idefics3")

WORDS = tuple(f"w{number}" for number in range(24))
# The default of 0.02 would make all responses nearly equally likely, and any mistake nearly invisible.
INITIALIZER_RANGE = 0.2
NORM_NOISE = 0.1

PATCH, MERGE = 4, 2
MIN_SIDE, MAX_SIDE = 16, 32
HIDDEN, HEADS, HEAD_DIM, MLP, LAYERS = 32, 2, 16, 48, 2
VISION_HIDDEN, VISION_HEADS, VISION_MLP, VISION_DEPTH = 16, 2, 24, 2

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_TEMPLATE = """\
{%- for message in messages -%}
    <|im_start|> {{ message.role }} {% if message.content is string %}{{ message.content }}{% else -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif -%}
    {%- endfor -%}
    {%- endif %}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|im_start|> assistant {% if enable_thinking %}thinking {% endif %}{{ suffix }}
{%- endif -%}
"""

IDEFICS_TILE = 16
IDEFICS_SCALE = 2
IDEFICS_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<unk>",
    "<image>", "<fake_token_around_image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
IDEFICS_TEMPLATE = """\
{%- for message in messages -%}
    <|im_start|> {{ message.role }} {% if message.content is string %}{{ message.content }}{% else -%}
    {%- for part in message.content -%}
        {%- if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif -%}
    {%- endfor -%}
    {%- endif %}<end_of_utterance>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|> assistant {% endif -%}
"""


def save_tiny_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random model with its processor; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "idefics3":
        tokenizer = _tokenizer(IDEFICS_SPECIAL, "<end_of_utterance>", IDEFICS_TEMPLATE)
        model = Idefics3ForConditionalGeneration(_idefics3_config(tokenizer))
        _save(model, tokenizer, folder)
        Idefics3Processor(
            Idefics3ImageProcessorPil(
                size={"longest_edge": 2 * IDEFICS_TILE},
                max_image_size={"longest_edge": IDEFICS_TILE},
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            ),
            tokenizer,
            image_seq_len=(IDEFICS_TILE // PATCH // IDEFICS_SCALE) ** 2,
            chat_template=IDEFICS_TEMPLATE,
        ).save_pretrained(folder)
        return folder
    if family == "qwen3_5":
        tokenizer = _qwen3_5_tokenizer()
        model = Qwen3_5ForConditionalGeneration(_qwen3_5_config(tokenizer))
    else:
        tokenizer = _tokenizer(QWEN_SPECIAL, "<|im_end|>", QWEN_TEMPLATE)
        if family == "qwen3_vl":
            model = Qwen3VLForConditionalGeneration(_qwen3_vl_config(tokenizer))
        else:
            assert family == "qwen2_5_vl", family
            model = Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(tokenizer))
    _save(model, tokenizer, folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": MIN_SIDE**2, "longest_edge": MAX_SIDE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Give a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=NORM_NOISE)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(special: tuple[str, ...], end_of_turn: str, template: str) -> PreTrainedTokenizerFast:
    words = ("user", "assistant", "system", "thinking", *WORDS)
    core = Tokenizer(WordLevel({token: index for index, token in enumerate((*special, *words))}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token=end_of_turn,
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token not in ("<|endoftext|>", end_of_turn, "<unk>")],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def _qwen3_5_tokenizer() -> Qwen3_5Tokenizer:
    # The Auto class builds this family's own tokenizer whatever the folder says, so it is a byte-level one here too.
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["\u0120", "\u010a"]
    tokenizer = Qwen3_5Tokenizer(
        vocab={token: index for index, token in enumerate((*QWEN_SPECIAL, *letters))},
        merges=[],
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in QWEN_SPECIAL if token not in ("<|endoftext|>", "<|im_end|>")],
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def _text_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        # Real vocabularies are padded to a round number: some rows have no token.
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, tokens, strict=True)}


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": VISION_DEPTH,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_MLP,
        "num_heads": VISION_HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "initializer_range": INITIALIZER_RANGE,
        **more,
    }


def _mrope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], **more}


def _qwen3_vl_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    text = _text_config(tokenizer, head_dim=HEAD_DIM, rope_parameters=_mrope(mrope_interleaved=True))
    return Qwen3VLConfig(
        text_config={**text, "tie_word_embeddings": True},
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        tie_word_embeddings=True,
        **_qwen_ids(tokenizer),
    )


def _qwen2_5_vl_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=_mrope()),
        # Windows of two visual tokens a side: an image of 16 x 24 pixels has two of them.
        vision_config=_qwen_vision(window_size=2 * PATCH * MERGE, fullatt_block_indexes=[1]),
        **_qwen_ids(tokenizer),
    )


def _qwen3_5_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    text = _text_config(
        tokenizer,
        head_dim=HEAD_DIM,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=_mrope(mrope_interleaved=True, partial_rotary_factor=1.0),
    )
    return Qwen3_5Config(
        text_config=text, vision_config=_qwen_vision(num_position_embeddings=16), **_qwen_ids(tokenizer)
    )


def _idefics3_config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    return Idefics3Config(
        text_config={
            **_text_config(tokenizer, head_dim=HEAD_DIM),
            "model_type": "llama",
        },
        vision_config={
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": VISION_MLP,
            "num_hidden_layers": VISION_DEPTH,
            "num_attention_heads": VISION_HEADS,
            "image_size": IDEFICS_TILE,
            "patch_size": PATCH,
            "initializer_range": INITIALIZER_RANGE,
        },
        scale_factor=IDEFICS_SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
