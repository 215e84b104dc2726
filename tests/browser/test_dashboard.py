"""What an operator asks is answered on Prefect's pages, in a real browser: the form, a run, its artifacts.

Prefect's own pages are the subject only in so far as they show what this project gives them.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
)
from prefect.client.schemas.objects import FlowRun
from support.browser import open_browser
from support.runs import small_config
from support.service import serving

from flows.config import RunConfig

pytestmark = pytest.mark.browser

PATIENCE = 120.0
"""Seconds for a run of seconds, on a busy machine."""
ARTIFACTS = ("run", "data-validation", "rounds", "gate", "result", "cost", "report")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, small_config(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def page(browser: Browser, service: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(30_000)
    yield page
    page.close()


@dataclass(frozen=True)
class Form:
    """What the deployment's form showed, and the run that it started."""

    text: str
    labels: set[str]
    values: set[str]
    complaint: str
    """Of the browser, on submitting a number that cannot be."""
    started: UUID


@pytest.fixture(scope="module")
def form(page: Page, service: str) -> Form:
    """Opened as its buttons do, given another name and fewer rounds than the default has, and submitted."""
    page.goto(f"{service}/v2/deployments")
    page.get_by_role("link", name="full-pipeline").click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    expect(page.get_by_text("How many rounds, and how large.")).to_be_visible(timeout=30_000)
    shown = page.locator("form")
    labels = {label.removesuffix(" (Optional)") for label in shown.locator("label").all_inner_texts()}
    values = shown.locator("input, textarea").evaluate_all("all => all.map(one => one.value)")
    text = shown.inner_text()
    field(page, "How runs are called on the dashboard.").fill("edited")
    rounds = field(page, "More of them extend a run that is there.")
    rounds.fill("0")
    submit = page.get_by_role("button", name="Submit")
    submit.click()
    complaint = rounds.evaluate("one => one.validationMessage")
    assert runs() == []
    rounds.fill("2")
    submit.click()
    page.wait_for_url(lambda url: "/run?" not in url and not url.endswith("/run"))
    (started,) = runs()
    return Form(text, labels, set(values), complaint, started.id)


def field(page: Page, help_text: str) -> Locator:
    """Give the field whose help this is."""
    label = page.locator("label").filter(has=page.locator(f"xpath=following-sibling::p[.='{help_text}']"))
    return page.locator(f"[id='{label.get_attribute('for')}']")


def runs() -> list[FlowRun]:
    """Give the runs of the deployment."""
    mine = DeploymentFilter(name=DeploymentFilterName(any_=["full-pipeline"]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(deployment_filter=mine)


def ended(run: UUID) -> FlowRun:
    """Wait for a run to end."""
    deadline = time.monotonic() + PATIENCE
    with get_client(sync_client=True) as client:
        while True:
            found = client.read_flow_run(run)
            assert found.state is not None
            if found.state.is_final():
                return found
            assert time.monotonic() < deadline, f"it is still {found.state}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def run(form: Form) -> FlowRun:
    return ended(form.started)


def open_tab(page: Page, service: str, run: FlowRun, tab: str) -> None:
    page.goto(f"{service}/v2/runs/flow-run/{run.id}")
    page.get_by_role("tab", name=tab, exact=True).click()


def open_artifact(page: Page, service: str, run: FlowRun, key: str) -> None:
    """As a person does: from the run to the key's history, and there to the run's entry."""
    open_tab(page, service, run, "Artifacts")
    page.locator(f"a[href$='/artifacts/key/{key}']").click()
    page.locator("a[href*='/artifacts/artifact/']").last.click()
    page.wait_for_url(re.compile("/artifacts/artifact/"))


def test_the_form_helps_with_every_section_and_has_the_defaults(form: Form) -> None:
    helps = {name: info.description or "" for name, info in RunConfig.model_fields.items()}
    assert [name for name, text in helps.items() if not text or text not in form.text] == []
    # Of the deployment's own configuration: the run's name, its prompts, its questions, and a model's path.
    assert {"small", "64", "40", "embedded:student"} <= form.values


def test_sections_are_called_as_in_the_configuration(form: Form) -> None:
    assert {"student", "teacher", "rounds", "num_rounds", "lora"} <= form.labels


def test_the_form_refuses_what_cannot_be(form: Form) -> None:
    assert "greater than or equal to 1" in form.complaint


def test_what_was_edited_is_what_ran(run: FlowRun) -> None:
    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    config = run.parameters["config"]
    assert (config["name"], config["rounds"]["num_rounds"], config["rounds"]["prompts_per_round"]) == ("edited", 2, 8)


def test_the_runs_page_names_run_and_stages(page: Page, service: str, run: FlowRun) -> None:
    open_tab(page, service, run, "Task Runs")
    expect(page.get_by_text("edited, seed 0").first).to_be_visible()
    expect(page.get_by_text("Completed").first).to_be_visible()
    for name in ("train, round 2", "replay, round 2"):
        page.get_by_placeholder("Search by run name").fill(name)
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
    page.get_by_placeholder("Search by run name").fill("train, round 3")
    expect(page.get_by_role("link", name="train, round 3")).to_have_count(0)


def test_a_runs_artifacts_are_one_of_each_kind(page: Page, service: str, run: FlowRun) -> None:
    open_tab(page, service, run, "Artifacts")
    for key in ARTIFACTS:
        expect(page.get_by_text(key, exact=True)).to_have_count(1)
    # The line below a key answers already.
    expect(page.get_by_text("2 rounds on the small world, 64 prompts")).to_be_visible()
    expect(page.get_by_text(re.compile(r"^Round 2 took .*; its gate: "))).to_be_visible()


@pytest.mark.parametrize(
    ("key", "answers"),
    [
        (
            "run",
            ["embedded:student", "embedded:teacher", "version of the data", "2, of 8 prompts with 4 responses each"],
        ),
        ("gate", ["Round 2: ", "effective sample share"]),
        ("result", ["student, before", "teacher, with crop", "the student is that of round"]),
        ("cost", ["total", "CPU seconds", "tokens"]),
    ],
)
def test_an_artifact_answers(page: Page, service: str, run: FlowRun, key: str, answers: list[str]) -> None:
    open_artifact(page, service, run, key)
    for answer in answers:
        expect(page.get_by_text(answer).first).to_be_visible()


def test_rounds_stand_below_each_other_the_last_one_first(page: Page, service: str, run: FlowRun) -> None:
    open_artifact(page, service, run, "rounds")
    expect(page.locator("tbody tr")).to_have_count(2)
    assert page.locator("tbody tr td:first-child").all_inner_texts() == ["2", "1"]


def test_the_report_opens(page: Page, service: str, run: FlowRun) -> None:
    open_artifact(page, service, run, "report")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="report.html").click(modifiers=["Control"])
    expect(opened.value).to_have_title(re.compile("edited"))
    opened.value.close()


def test_the_history_of_a_key_has_an_entry_for_each_run(page: Page, service: str, run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        again = client.create_flow_run_from_deployment(run.deployment_id, parameters=run.parameters)
    assert ended(again.id).state_type == "COMPLETED"
    for key in ("run", "result", "cost", "report"):
        page.goto(f"{service}/v2/artifacts/key/{key}")
        expect(page.get_by_role("link", name="edited, seed 0")).to_have_count(2)


def test_a_failed_runs_page_names_the_cause(page: Page, service: str, run: FlowRun) -> None:
    config = {**run.parameters["config"], "name": "wrong"}
    config["student"] = {**config["student"], "path": "/models/nowhere"}
    with get_client(sync_client=True) as client:
        failed = client.create_flow_run_from_deployment(run.deployment_id, parameters={"config": config})
    assert ended(failed.id).state_type == "FAILED"
    open_tab(page, service, ended(failed.id), "Details")
    expect(page.get_by_text("model path must be a local folder, got '/models/nowhere'")).to_be_visible()
