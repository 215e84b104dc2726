"""A model folder is given to a running server with all that the server must read."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapters.models import model_folder, weight_shapes
from tasks.adapters.vllm_weights import reloadable

INPUT, OUTPUT, OTHER = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TENSORS = {
    INPUT: torch.arange(6.0).reshape(3, 2),
    OUTPUT: torch.arange(6.0, 12.0).reshape(3, 2),
    OTHER: torch.arange(2.0),
}


def save(folder: Path, files: Mapping[str, tuple[str, ...]]) -> Path:
    """Write a model folder: the names of the tensors in each file, and an index where there are several files."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for file, names in files.items():
        save_file({name: TENSORS[name] for name in names}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Read as vLLM does: the files that an index names, or all where there is none."""
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        if named is None or path.name in named:
            tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": (INPUT, OTHER)},
        {"model-1.safetensors": (INPUT,), "model-2.safetensors": (OTHER,)},
        {"model-1.safetensors": (OTHER,), "model-2.safetensors": (INPUT,)},
    ],
)
def test_a_shared_output_layer_is_written_out(files: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", files)
    copy = tmp_path / "copy"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with reloadable(folder, copy) as given:
        assert given == copy
        tensors = read(given)
        assert set(tensors) == {INPUT, OTHER, OUTPUT}
        assert torch.equal(tensors[OUTPUT], TENSORS[INPUT])
        assert torch.equal(tensors[INPUT], TENSORS[INPUT])
        assert torch.equal(tensors[OTHER], TENSORS[OTHER])
        assert (given / "config.json").read_text() == "{}"
        # A name of its own in each file.
        sizes = [len(load_file(path)) for path in given.glob("*.safetensors")]
        assert sum(sizes) == len(tensors)
    assert not copy.exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": (INPUT, OUTPUT, OTHER)},
        {"model-1.safetensors": (INPUT, OTHER), "model-2.safetensors": (OUTPUT,)},
        {"model-1.safetensors": (OUTPUT,), "model-2.safetensors": (INPUT, OTHER)},
        # No input embedding of a known name: nothing that could be written out.
        {"model.safetensors": (OTHER,)},
    ],
)
def test_a_folder_with_all_its_tensors_is_given_as_it_is(files: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", files)
    with reloadable(folder, tmp_path / "copy") as given:
        assert given == folder
        assert not (tmp_path / "copy").exists()
    assert set(read(folder)) == {name for names in files.values() for name in names}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_small_world(role: str, tmp_path: Path) -> None:
    folder = model_folder(f"embedded:{role}")
    shapes = weight_shapes(folder)
    shared = shapes[INPUT]
    assert OUTPUT not in shapes
    with reloadable(folder, tmp_path / "copy") as given:
        assert weight_shapes(given) == {**shapes, OUTPUT: shared}
        assert {path.name for path in given.iterdir()} - {path.name for path in folder.iterdir()} == {
            "output.safetensors"
        }


def test_the_copy_goes_also_after_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"model.safetensors": (INPUT,)})

    def fail() -> None:
        with reloadable(folder, tmp_path / "copy") as given:
            assert given.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not (tmp_path / "copy").exists()
    assert (folder / "model.safetensors").exists()


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"model.safetensors": (INPUT,)})
    stale = save(tmp_path / "copy", {"stale.safetensors": (OTHER,)})
    with reloadable(folder, stale) as given:
        assert set(read(given)) == {INPUT, OUTPUT}


def test_a_folder_of_links_is_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder, and files that are links, as in a download cache."""
    real = save(tmp_path / "blobs", {"model.safetensors": (INPUT,)})
    (tmp_path / "model").mkdir()
    for path in real.iterdir():
        (tmp_path / "model" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    monkeypatch.chdir(tmp_path)
    with reloadable(Path("model"), Path("deep") / "copy") as given:
        assert set(read(given)) == {INPUT, OUTPUT}
