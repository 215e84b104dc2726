"""The report in a real browser: it is whole, it fetches and runs nothing, and it fits a phone as well as a desk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from support.browser import open_browser
from support.run_artifacts import HOSTILE, Run

from tasks.adapters.side_by_side import build_comparison

pytestmark = pytest.mark.browser

PHONE, TABLET, DESK = 390, 900, 1280
PAGES = ("report", "two runs")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    # A published benchmark, several seeds and a choice: all that a page can show; names as long as they get.
    name = "a-run-whose-name-is-" + "long-" * 20
    prompts = ("third", "fourth", "plain", "hostile")
    first = Run(folder / "run", num_rounds=4, chosen=3, seeds=(1, 2), kind="vstar", name=name, names=prompts)
    second = Run(folder / "run", num_rounds=2, seeds=(1, 2), kind="vstar", name="another")
    pages = {"report": first.page(), "two runs": build_comparison(first.job, second.job, first.store)}
    for title, page in pages.items():
        (folder / f"{title}.html").write_text(page, encoding="utf-8")
    return {title: folder / f"{title}.html" for title in pages}


class Opened:
    """A page with all that the browser said about it."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.url = page, file.as_uri()
        self.requests: list[str] = []
        self.said: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        page.goto(self.url)


@pytest.fixture(
    params=[
        (title, width, scheme) for title in PAGES for width in (PHONE, TABLET, DESK) for scheme in ("light", "dark")
    ],
    ids=str,
)
def opened(request: pytest.FixtureRequest, browser: Browser, files: dict[str, Path]) -> Iterator[Opened]:
    title, width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield Opened(context.new_page(), files[title])
    context.close()


def unfold(page: Page) -> None:
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("details:not([open])").count() == 0


def test_nothing_is_fetched_and_nothing_complains(opened: Opened) -> None:
    unfold(opened.page)
    opened.page.mouse.wheel(0, 100_000)
    opened.page.wait_for_load_state("networkidle")
    fetched = [url for url in opened.requests if not url.startswith("data:")]
    assert fetched == [opened.url]
    assert opened.said == []


def test_nothing_is_wider_than_the_screen(opened: Opened) -> None:
    unfold(opened.page)
    width = opened.page.viewport_size["width"]
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    # What stands out of its own card: a table that is wider must be inside something that scrolls.
    outside = opened.page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(element => {
            if (element.closest('.scroll, svg, .text')) return false;
            const box = element.getBoundingClientRect();
            return box.width && (box.right > window.innerWidth + 1 || box.left < -1);
        }).map(element => element.outerHTML.slice(0, 120))"""
    )
    assert outside == []


def test_charts_are_drawn_and_large_enough_to_read(opened: Opened) -> None:
    charts = opened.page.locator(".plot > svg")
    assert charts.count() >= 10
    for chart in charts.all():
        box = chart.bounding_box()
        assert box is not None
        # 350 x 190 units: a unit is near a pixel, so text is near its 11 pixels.
        assert 280 <= box["width"] <= 450
        assert box["height"] == pytest.approx(box["width"] * 190 / 350, rel=0.02)
        assert chart.locator("path").count() > 3
    ends = opened.page.evaluate(
        """() => [...document.querySelectorAll('.plot > svg')].flatMap(svg => {
            const outer = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect())
                .filter(box => box.left < outer.left - 2 || box.right > outer.right + 2 || box.height < 7);
        }).length"""
    )
    assert ends == 0, "labels are neither cut nor tiny"


def test_text_can_be_read_in_light_and_in_dark(opened: Opened) -> None:
    unfold(opened.page)
    poor = opened.page.evaluate(Path(__file__).with_name("contrast.js").read_text())
    assert poor == []


def test_colours_follow_the_scheme(browser: Browser, files: dict[str, Path]) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
        page = Opened(context.new_page(), files["report"]).page
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(grounds) == 2


def test_every_picture_is_there(browser: Browser, files: dict[str, Path]) -> None:
    opened = Opened(browser.new_page(), files["report"])
    sizes = opened.page.evaluate("[...document.images].map(image => [image.naturalWidth, image.width, image.complete])")
    # Both prompts of the last round, each with its image and two crops; three questions that became right.
    assert len(sizes) == 2 * 3 + 3
    assert all(natural > 0 and shown > 20 and complete for natural, shown, complete in sizes)
    opened.page.close()


def test_boxes_lie_on_the_picture_where_the_regions_are(browser: Browser, files: dict[str, Path]) -> None:
    opened = Opened(browser.new_page(), files["report"])
    prompt = opened.page.locator(".prompt .pictures").first
    image = prompt.locator("figure.full img").bounding_box()
    box = prompt.locator("rect.positive").bounding_box()
    assert image is not None
    assert box is not None
    # (4, 4, 12, 12) in a frame of 80 x 40.
    assert (box["x"] - image["x"]) / image["width"] == pytest.approx(0.05, abs=0.01)
    assert (box["y"] - image["y"]) / image["height"] == pytest.approx(0.1, abs=0.02)
    assert box["width"] / image["width"] == pytest.approx(0.1, abs=0.02)
    opened.page.close()


def test_hostile_text_is_text(browser: Browser, files: dict[str, Path]) -> None:
    opened = Opened(browser.new_page(), files["report"])
    unfold(opened.page)
    assert opened.page.locator("script").count() == 0
    assert opened.page.locator("img[onerror]").count() == 0
    assert opened.page.get_by_text(HOSTILE, exact=True).count() >= 3
    # A response's tokens, each an element of its own, give its text again.
    texts = opened.page.locator(".responses .text").all_inner_texts()
    assert HOSTILE in texts
    assert opened.said == []
    opened.page.close()
