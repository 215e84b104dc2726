"""What the commands that run a flow share: configuration, server, messages, exit codes."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.config import LAPTOP, PROJECT, load_config
from flows.server import prefect_server
from flows.terminal import show_on_terminal
from vzero_core.errors import VZeroError


def run_command(path: Path | None, flow: Callable[..., Any], show: Callable[[Any], None] | None = None) -> int:
    """Run a flow with a Prefect server, the configured one or one of its own; give the exit code.

    Args:
        path: of the TOML configuration; None: the laptop's.
        flow: takes the configuration.
        show: prints what the flow gives; where it gives nothing, the message of its last state is printed.
    """
    show_on_terminal()
    # As Ctrl-C: who is ended without a word leaves a Prefect server behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = load_config(path) if path else LAPTOP
        with prefect_server(PROJECT / ".vzero" / "prefect") as url:
            print(f"dashboard while this runs: {url.removesuffix('/api')}", flush=True)
            state = flow(config, return_state=True)
            result = state.result()
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if result is not None and show is not None:
        show(result)
    else:
        print(state.message)
    return 0
