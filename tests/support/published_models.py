"""Sizes of the models that the method was published with: folders that hold a config.json and nothing else."""

import json
from pathlib import Path
from typing import Any


def _text(hidden: int, mlp: int, layers: int, heads: int, linear_heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_text",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": linear_heads,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }


def _vision(depth: int, hidden: int, mlp: int, out: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5",
        "depth": depth,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": out,
        "num_position_embeddings": 2304,
    }


PUBLISHED = {
    "Qwen3.5-4B": (_text(2560, 9216, 32, 16, 32, tied=True), _vision(24, 1024, 4096, 2560)),
    # Its vision tower is taken for that of 27B, with an output of its own width.
    "Qwen3.5-9B": (_text(4096, 12_288, 32, 16, 32, tied=False), _vision(27, 1152, 4304, 4096)),
    "Qwen3.5-27B": (_text(5120, 17_408, 64, 24, 48, tied=False), _vision(27, 1152, 4304, 5120)),
}
"""Text and vision, as published (docs/PLAN.md says where they were read)."""


def save_published_models(root: Path) -> Path:
    """Write a folder for each of them, and give where they lie."""
    for name, (text, vision) in PUBLISHED.items():
        config: dict[str, Any] = {"model_type": "qwen3_5", "text_config": text, "vision_config": vision}
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root
