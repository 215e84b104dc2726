"""Images of a round are read once and kept within limits; who asks cannot tell."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.adapters import dataset as module
from tasks.adapters.dataset import Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Store
from tasks.artifacts import Sample
from vzero_core.errors import InputError

SIDE = 8
NUM_BYTES = SIDE * SIDE * 3


class World:
    """A folder of pictures, one a sample, each of one shade."""

    def __init__(self, folder: Path, names: str) -> None:
        self.folder = folder
        reader = ImageReader(str(folder), max_pixels=SIDE * SIDE)
        self.dataset = Dataset(Store(str(folder / "store"), folder / "work"), reader)
        self.samples = {}
        for name in names:
            Image.new("RGB", (SIDE, SIDE), (ord(name),) * 3).save(folder / f"{name}.png")
            image = reader.inspect(f"{name}.png", decode=True).ref
            self.samples[name] = Sample(id=name, image=image, question="q")

    def shade(self, name: str) -> str:
        image = self.dataset.image(self.samples[name])
        (value,) = np.unique(np.asarray(image))
        return chr(value)

    def lose_all(self) -> None:
        for path in self.folder.glob("*.png"):
            path.unlink()


def test_an_image_is_read_once(tmp_path: Path) -> None:
    world = World(tmp_path, "abc")
    assert [world.shade(name) for name in "abc"] == list("abc")
    world.lose_all()
    assert [world.shade(name) for name in "cab"] == list("cab")


@pytest.mark.parametrize(("room", "kept"), [(3 * NUM_BYTES, "acd"), (3 * NUM_BYTES - 1, "ad"), (NUM_BYTES - 1, "")])
def test_what_was_asked_for_longest_ago_goes_first(
    room: int, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGE_BYTES_KEPT", room)
    world = World(tmp_path, "abcd")
    asked = "abcaad"
    # Twice, so that what went is counted as gone.
    for _ in range(2):
        assert "".join(world.shade(name) for name in asked) == asked
    world.lose_all()
    for name in "abcd":
        if name in kept:
            assert world.shade(name) == name
        else:
            with pytest.raises(InputError):
                world.dataset.image(world.samples[name])


def test_samples_with_one_picture_have_an_image_each(tmp_path: Path) -> None:
    """The engine takes prompts with the very same image object for views of one sample."""
    world = World(tmp_path, "a")
    other = world.samples["a"].model_copy(update={"id": "b"})
    first, second = world.dataset.image(world.samples["a"]), world.dataset.image(other)
    assert first is not second
    assert first is world.dataset.image(world.samples["a"])


def test_a_picture_that_was_validated_anew_is_read_anew(tmp_path: Path) -> None:
    world = World(tmp_path, "ab")
    assert world.shade("a") == "a"
    world.samples["a"] = world.samples["a"].model_copy(update={"image": world.samples["b"].image})
    assert world.shade("a") == "b"
