"""The event that starts a retraining: somebody noticed new samples."""

from typing import Literal

from prefect.client.orchestration import get_client
from prefect.events import Event, Resource

from flows.config import RunConfig

SAMPLES_ADDED = "vzero.samples.added"


def announce_samples(config: RunConfig, data: str, how: Literal["poll", "add_samples"]) -> None:
    """Tell the Prefect server that there are new samples; deployments can start for it.

    The server is asked to take the event: one that is queued, as Prefect's own are, may be lost without a word.

    Args:
        config: of the run that learns from these data.
        data: version of the data now.
        how: who noticed.

    Raises:
        httpx.TransportError: no server answers.
        PrefectHTTPStatusError: the server does not take the event.
    """
    event = Event(
        event=SAMPLES_ADDED,
        resource=Resource(
            {"prefect.resource.id": f"vzero.samples.{config.name}", "prefect.resource.name": config.name}
        ),
        payload={"data": data, "how": how},
    )
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
