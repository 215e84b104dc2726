"""The event that starts a retraining: somebody noticed new samples."""

from typing import Literal

from prefect.events import emit_event

from flows.config import RunConfig

SAMPLES_ADDED = "vzero.samples.added"


def announce_samples(config: RunConfig, data: str, how: Literal["poll", "add_samples"]) -> None:
    """Tell the Prefect server that there are new samples; deployments can start for it.

    Args:
        config: of the run that learns from these data.
        data: version of the data now.
        how: who noticed.
    """
    emit_event(
        event=SAMPLES_ADDED,
        resource={"prefect.resource.id": f"vzero.samples.{config.name}", "prefect.resource.name": config.name},
        payload={"data": data, "how": how},
    )
