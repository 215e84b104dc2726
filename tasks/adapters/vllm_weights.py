"""A model folder in the form in which a running vLLM server takes all of its weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

OUTPUT = "lm_head.weight"
INPUT_SUFFIX = "embed_tokens.weight"


@contextmanager
def reloadable(folder: Path, copy: Path) -> Iterator[Path]:
    """Give the folder, or for a while a copy of it with the output layer's weights as a tensor of their own.

    Where a model's output layer shares its weights with the input embedding, its files hold them once, and vLLM 0.32,
    which may keep a rearranged copy of the output layer (it does on CPU), goes on with the old one.

    Args:
        folder: model folder.
        copy: where the copy is made, of links to the folder's files; what lies there is deleted, before and after.
    """
    files = {path.name: path.resolve() for path in folder.iterdir() if path.is_file()}
    shared = None
    for path in (path for name, path in files.items() if name.endswith(".safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if OUTPUT in names:
                yield folder
                return
            if found := sorted(name for name in names if name.endswith(INPUT_SUFFIX)):
                shared = file.get_tensor(found[0])
    if shared is None:
        yield folder
        return
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        for name, path in files.items():
            # An index would hide the file that it does not name.
            if not name.endswith(".index.json"):
                os.symlink(path, copy / name)
        save_file({OUTPUT: shared}, copy / "output.safetensors", metadata={"format": "pt"})
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)
