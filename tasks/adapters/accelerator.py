"""accelerate's part: processes, and the trackers that figures are sent to."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vzero_core.errors import ConfigError


def make_accelerator(*, cpu: bool, trackers: Sequence[str], run_name: str, folder: Path) -> Accelerator:
    """Join the processes that `accelerate launch` started, or stand for this one alone, and open the trackers.

    Args:
        cpu: compute on the CPU also where there is a GPU.
        trackers: accelerate's names of them.
        run_name: what a run is called there.
        folder: for trackers that write files.
    """
    # Types are set by the trainer, whose weights stay in float32.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", log_with=list(trackers) or None, project_dir=folder)
    if trackers:
        accelerator.init_trackers(run_name)
    return accelerator


def require_trackers(trackers: Sequence[str]) -> None:
    """Stop where a tracker's package is not there: accelerate would pass over it.

    Raises:
        ConfigError: one is missing.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in trackers if name not in available]:
        raise ConfigError(
            f"tracking.trackers must be installed, got {', '.join(missing)}; install the package or leave it out"
        )
