"""`vzero_core` stays pure: importing it loads none of the heavy parts, and its source asks for nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
FORBIDDEN = {"prefect", "transformers", "vllm", "s3fs", "fsspec", "pandas", "pyarrow", "accelerate", "datasets", "PIL"}
ALLOWED = {"torch", "pydantic", "vzero_core"} | set(sys.stdlib_module_names)

IMPORT_ALL = """
import importlib, pkgutil, sys
import vzero_core
names = [module.name for module in pkgutil.walk_packages(vzero_core.__path__, "vzero_core.")]
for name in names:
    importlib.import_module(name)
print(" ".join(names))
print(" ".join({name.split(".")[0] for name in sys.modules}))
"""


def test_importing_every_module_loads_no_heavy_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported, loaded = done.stdout.splitlines()
    assert {"vzero_core.losses", "vzero_core.views", "vzero_core.diagnostics"} <= set(imported.split())
    assert "torch" in loaded.split()
    assert not FORBIDDEN & set(loaded.split())


def test_source_imports_only_torch_pydantic_and_the_standard_library() -> None:
    files = sorted((ROOT / "vzero_core").rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                names = [node.module or ""]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= ALLOWED, (file, names)
