import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3VLForConditionalGeneration,
)

from tasks.small_world.labelled import patchify, prompt_ids
from tasks.small_world.make_models import MODELS
from tasks.small_world.measure import accuracy
from tasks.small_world.scenes import make_sample

QUESTION = "digit on the red square ?"
FOLDERS = ("student", "teacher")
COUNT = 200
# Shares of 200 questions; the full 1,000 are in the slow test. The bands are three standard errors wide.
STUDENT_BAND, TEACHER_PLAIN, TEACHER_POSITIVE, TEACHER_NEGATIVE = (0.30, 0.53), (0.75, 0.92), 0.92, (0.64, 0.84)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "student")


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForImageTextToText.from_pretrained(MODELS / name).eval() for name in FOLDERS}


def test_the_stock_class_loads_in_float32(models):
    assert all(type(model) is Qwen3VLForConditionalGeneration for model in models.values())
    assert all(model.dtype == torch.float32 for model in models.values())


def test_the_folders_hold_no_pickle():
    names = {path.name for name in FOLDERS for path in (MODELS / name).iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_the_chat_template_renders_images_where_they_stand(tokenizer):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for images in (1, 2):
        content = [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]
        for system in ([], [{"role": "system", "content": ""}]):
            text = tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            assert text == f"<|user|>{image * images}{QUESTION}<|assistant|>"


def test_text_survives_the_tokenizer(tokenizer):
    text = "red b3 7 answer 7"
    ids = tokenizer(text + tokenizer.eos_token).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in tokenizer(QUESTION).input_ids


def test_images_pass_unscaled_and_count_16_and_4_tokens():
    processor = AutoImageProcessor.from_pretrained(MODELS / "student")
    sample = make_sample(0, "train", 0)
    for pixels, tokens in ((sample.picture, 16), (sample.detail[:32, :32], 4)):
        output = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        assert int(output["image_grid_thw"].prod()) // processor.merge_size**2 == tokens
        expected = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(output["pixel_values"], patchify(expected), atol=1e-5, rtol=0)


def test_prompts_hold_one_pad_for_each_visual_token(tokenizer):
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert prompt_ids(QUESTION, (16,)).count(pad) == 16
    assert prompt_ids(QUESTION, (16, 4)).count(pad) == 20


def test_the_models_start_where_they_should(models):
    low, high = STUDENT_BAND
    assert low < accuracy(models["student"], "none", COUNT) < high
    plain, positive, negative = (accuracy(models["teacher"], v, COUNT) for v in ("none", "positive", "negative"))
    assert TEACHER_PLAIN[0] < plain < TEACHER_PLAIN[1]
    assert positive > TEACHER_POSITIVE
    assert TEACHER_NEGATIVE[0] < negative < TEACHER_NEGATIVE[1]
