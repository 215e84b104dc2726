"""Model folders: their identity, and one clear message where something is wrong with them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.plain import PROMPT
from support.tiny_models import FAMILIES, picture, save_tiny_model
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tasks.adapters.models as models
from tasks.adapters.models import (
    ComposedProcessor,
    load_model,
    load_processor,
    model_digest,
    model_folder,
    weights_digest,
)
from tasks.adapters.prompts import PromptProcessor, num_tokens
from tasks.config import PromptConfig
from tasks.ports import Prompt
from vzero_core.errors import InputError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A Qwen3-VL folder to spoil."""
    return shutil.copytree(folders["qwen3_vl"], tmp_path / "model")


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# --- identity -----------------------------------------------------------------------------------------------------


def test_a_models_digest_is_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    digest = model_digest(folder, memory)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_digest(copy, memory) == digest
    (copy / "README.md").write_text("Words about a model are no part of it.")
    assert model_digest(copy, memory) == digest


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_models_digest_changes_with_any_file(name: str, folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    digest = model_digest(folder, memory)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert model_digest(folder, memory) != digest


def test_a_models_digest_changes_with_any_weight(folder: Path, tmp_path: Path) -> None:
    seen = {model_digest(folder, tmp_path / "digests.json")}
    names = sorted(load_file(folder / WEIGHTS))
    for name in names[:: len(names) // 5]:
        rewrite(folder / WEIGHTS, lambda weights, name=name: weights[name].view(-1)[-1:].add_(1e-3))
        seen.add(model_digest(folder, tmp_path / "digests.json"))
    assert len(seen) == 1 + len(names[:: len(names) // 5])


def test_what_was_hashed_is_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "deep" / "digests.json"
    hashed: list[Path] = []
    sha256_file = models.sha256_file
    monkeypatch.setattr(models, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    digest = model_digest(folder, memory)
    assert folder / WEIGHTS in hashed
    hashed.clear()
    assert model_digest(folder, memory) == digest
    assert hashed == []
    os.utime(folder / WEIGHTS, ns=(0, 0))
    assert model_digest(folder, memory) == digest
    assert hashed == [folder / WEIGHTS]


def test_weights_in_memory_have_a_digest_of_their_own(folder: Path) -> None:
    model = load_model(folder, "float32", "cpu")
    digest = weights_digest(model.state_dict())
    assert weights_digest(load_model(folder, "float32", "cpu").state_dict()) == digest
    assert weights_digest(load_model(folder, "bfloat16", "cpu").state_dict()) != digest
    for parameter in (next(model.parameters()), list(model.parameters())[-1]):
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        changed = weights_digest(model.state_dict())
        assert changed != digest
        digest = changed


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_path_must_be_a_model_folder(folder: Path, tmp_path: Path) -> None:
    assert model_folder(str(folder)) == folder
    assert (model_folder("embedded:student") / "config.json").is_file()
    with pytest.raises(InputError, match="embedded:student"):
        model_folder("embedded:professor")
    with pytest.raises(InputError, match="local folder"):
        model_folder(str(tmp_path / "nowhere"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="safetensors"):
        model_folder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        model_folder(str(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    """Left alone, transformers would draw them at random."""
    name = "model.visual.blocks.0.attn.qkv.weight"
    rewrite(folder / WEIGHTS, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=name):
        load_model(folder, "float32", "cpu")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    name = "model.visual.blocks.0.attn.qkv.weight"
    rewrite(folder / WEIGHTS, lambda weights: weights.update({name: weights[name][1:].clone()}))
    with pytest.raises(InputError, match=name):
        load_model(folder, "float32", "cpu")


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match="whole weights"):
        load_model(folder, "float32", "cpu")


def test_a_text_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="image-text-to-text"):
        load_model(folder, "float32", "cpu")


# --- processors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_folder_without_processor_or_tokenizer_is_refused(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match="processor" if missing.startswith("pre") else "tokenizer|processor"):
        load_processor(folder)


def test_a_folder_without_a_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template"):
        load_processor(folder)


def test_a_processor_that_cannot_be_put_together_names_what_it_needs(folder: Path) -> None:
    """SmolVLM's processor wants torchvision for videos, and its image tokens are not laid out like Qwen's."""
    (folder / "config.json").write_text(json.dumps({"model_type": "smolvlm", "image_token_id": 6}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SmolVLMImageProcessor"}))
    pytest.importorskip("transformers.models.smolvlm")
    if _has_torchvision():
        pytest.skip("the full processor loads where torchvision does")
    with pytest.raises(InputError, match="needs more than is installed"):
        load_processor(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_as_many_visual_tokens_as_the_model_gives_features(family: str, folders: dict[str, Path]) -> None:
    processor = PromptProcessor(folders[family])
    model = load_model(folders[family], "float32", "cpu")
    lengths = set()
    for sizes in ([(16, 16)], [(32, 16)], [(16, 16), (32, 24)]):
        images = [picture(*size, seed) for seed, size in enumerate(sizes)]
        inputs = processor.encode(processor.prompt("w1", images, PROMPT))
        assert (inputs["input_ids"] == model.config.image_token_id).sum() > 0
        assert "attention_mask" not in inputs
        model(**inputs)
        lengths.add(num_tokens(inputs))
    assert len(lengths) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_a_stray_image_token_is_refused(family: str, folders: dict[str, Path]) -> None:
    processor = PromptProcessor(folders[family])
    token = processor.tokenizer.convert_ids_to_tokens(
        json.loads((folders[family] / "config.json").read_text())["image_token_id"]
    )
    with pytest.raises(InputError, match="one image placeholder per image"):
        processor.encode(processor.prompt(f"w1 {token}", [picture(16, 16, 0)], PROMPT))
    text = processor.render("w1", 2, PROMPT)
    with pytest.raises(InputError, match="one image placeholder per image"):
        processor.encode(Prompt(text, (picture(16, 16, 0),)))


def test_template_system_and_thinking_reach_the_prompt(folders: dict[str, Path]) -> None:
    processor = PromptProcessor(folders["qwen3_vl"])
    plain = processor.render("w1 {question}", 1, PromptConfig())
    assert "system" not in plain
    assert "thinking" not in plain
    # What a question says is not read as a template.
    assert "<|vision_end|>w1 {question}<|im_end|>" in plain
    full = processor.render("w1", 2, PromptConfig(system="w9", template="w7 {question} w8", enable_thinking=True))
    assert full.startswith("<|im_start|> system w9<|im_end|>")
    assert full.count("<|image_pad|>") == 2
    assert "<|vision_end|>w7 w1 w8<|im_end|>" in full
    assert full.endswith("assistant thinking ")
    chosen = PromptConfig(chat_template_args={"suffix": "w3"})
    assert processor.render("w1", 1, chosen) == processor.render("w1", 1, PromptConfig()) + "w3"


def _has_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.skipif(not _has_torchvision(), reason="the full processors of the Qwen-VL families need torchvision")
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_the_composed_processor_is_the_full_one(family: str, folders: dict[str, Path]) -> None:
    """On pictures that need no resizing: torchvision's filter rounds otherwise than Pillow's."""
    full = load_processor(folders[family])
    assert not isinstance(full, ComposedProcessor)
    composed = ComposedProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(folders[family]),
        AutoTokenizer.from_pretrained(folders[family]),
        json.loads((folders[family] / "config.json").read_text())["image_token_id"],
    )
    text = PromptProcessor(folders[family]).render("w1 w2", 2, PROMPT)
    images = [picture(24, 16, 0), picture(32, 32, 1)]
    ours = composed(text=[text], images=[images])
    theirs = full(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
    assert set(ours) == set(theirs) - {"attention_mask"}
    for name, tensor in ours.items():
        assert (tensor - torch.as_tensor(theirs[name])).abs().max() <= 1e-6, name


def test_equal_seeds_make_equal_models(folders: dict[str, Path], tmp_path: Path) -> None:
    again = save_tiny_model("qwen3_vl", tmp_path / "again")
    memory = tmp_path / "digests.json"
    assert model_digest(again, memory) == model_digest(folders["qwen3_vl"], memory)
