"""Installs TRL into the environment of the Python that runs this; `make bench` calls it, with torch there already.

TRL's multimodal training needs the processors' full classes, and these need torchvision.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.vllm_cpu import TORCHVISION, alter_torchvision, pip

TRL = "trl==1.16.0"
CONSTRAINTS = Path(__file__).with_name("trl_constraints.txt")


def main() -> None:
    """Install."""
    pip("--no-deps", TORCHVISION)
    pip("-c", str(CONSTRAINTS), TRL, "pillow")
    alter_torchvision()
    subprocess.run([sys.executable, "-c", "import torchvision; from trl import DistillationTrainer"], check=True)


if __name__ == "__main__":
    main()
