"""report.html in a real Chromium: `make test-report`. The page is of the size of a run of `make run`, with
hostile texts among its designs, names and answers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catmllm.report.run import write_report
from tests.report.test_run import full_run, made_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metrics, tested, answers = full_run(1024)
    run = made_run(tmp_path_factory.mktemp("runs") / "full", metrics)
    for stage, rows in answers.items():
        (run / stage / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(run, tested)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "there is no Chromium: apt-get install chromium, or set CHROMIUM to one"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A report in a page of its own, and everything that went wrong there."""

    def __init__(self, browser: Any, report: Path, width: int = 1280, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.wrong: list[str] = []
        self.requests: list[str] = []
        # what Chromium says of drawing without a GPU is no fault of the page
        self.page.on("console", lambda m: None if "GL Driver" in m.text else self.wrong.append(m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("html[data-live=yes]")

    def part(self, name: str) -> Any:
        part = self.page.locator(f"[data-live={name}]")
        part.scroll_into_view_if_needed()
        return part

    def picture(self, part: Any) -> str:
        """What the canvas of a part's structure holds."""
        part.locator(".canvas canvas").first.wait_for()
        return str(part.locator(".canvas canvas").first.evaluate("canvas => canvas.toDataURL()"))


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Opened:
    return Opened(browser, report)


def test_the_page_is_one_small_file_without_faults_or_requests(opened: Opened, report: Path) -> None:
    assert report.stat().st_size < 5_000_000
    for name in ("parity", "tasks", "answers", "training"):
        assert opened.part(name).locator("svg, .rows").count() > 0
    assert opened.wrong == [] and opened.requests == [report.as_uri()]


@pytest.mark.parametrize("name", ["parity", "tasks", "answers"])
def test_a_structure_turns(opened: Opened, name: str) -> None:
    part = opened.part(name)
    stage = part.locator(".canvas")
    stage.scroll_into_view_if_needed()
    before = opened.picture(part)
    box = stage.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.page.mouse.move(x, y)
    opened.page.mouse.down()
    opened.page.mouse.move(x + 80, y + 20, steps=4)
    opened.page.mouse.up()
    turned = opened.picture(part)
    assert turned != before
    stage.press("ArrowLeft")
    assert opened.picture(part) != turned
    part.get_by_role("button", name="3 × 3").click()
    assert part.get_by_role("button", name="3 × 3").get_attribute("aria-pressed") == "true"


def test_pointing_at_the_parity_plot_names_a_system(opened: Opened) -> None:
    part = opened.part("parity")
    part.get_by_label("adsorbate").select_option("CO")
    bright = part.locator('circle[opacity="0.85"]')
    n = int(re.match(r"n (\d+)", part.locator(".count").inner_text())[1])  # type: ignore[index]
    assert 0 < bright.count() == n < 328
    bright.nth(3).hover(force=True)
    words = opened.page.locator(".tip").inner_text()
    assert re.match(r"CO on [A-Z]\w+ \(1 [01] [01]\)\nlabel ", words), words
    assert part.locator(".said b").inner_text() == words.split("\n")[0]
    first = opened.picture(part)
    bright.nth(30).click(force=True)
    opened.page.mouse.move(0, 0)
    assert opened.picture(part) != first  # what was pressed stays when the pointer has gone
    part.get_by_label("adsorbate").select_option("")


def test_the_table_of_answers_filters_sorts_and_shows(opened: Opened) -> None:
    part = opened.part("answers")
    count = part.locator(".count")
    assert count.inner_text() == "3072 of 3072 answers" and part.locator("tbody tr").count() == 100
    part.get_by_label("fails").select_option("PF")
    assert count.inner_text() == "3 of 3072 answers"
    part.locator("tbody tr").first.click()
    assert "<script>alert" in part.locator(".stage pre").inner_text()  # as text
    assert "Unreadable (<script>" in part.locator(".absent").inner_text()
    # nothing lies over these words, the structure of before least of all
    part.locator(".absent").scroll_into_view_if_needed()
    box = part.locator(".absent").bounding_box()
    at = f"document.elementFromPoint({box['x'] + 9}, {box['y'] + 9}).className"
    assert opened.page.evaluate(at) == "absent"
    part.get_by_label("fails").select_option("")
    part.get_by_label("decoding").select_option("free")
    part.get_by_label("adsorbate").select_option("OH")
    shown = part.locator("tbody tr").all_inner_texts()
    assert shown and all(row.startswith("OH on ") and "free" in row for row in shown)
    part.get_by_role("button", name="system").click()
    names = part.locator("tbody td:first-child").all_inner_texts()
    assert names == sorted(names) and len(set(names)) > 3
    part.locator("tbody tr").nth(2).click()
    assert part.locator(".said b").inner_text() == names[2]
    assert "_atom_site_fract_x" in part.locator(".stage pre").text_content()
    assert opened.wrong == []


def test_a_task_shows_its_search(opened: Opened) -> None:
    part = opened.part("tasks")
    assert part.locator("tbody tr").count() == 48
    row = part.locator("tbody tr").nth(20)
    name = row.locator("td").first.inner_text()
    row.click()
    assert part.locator("svg .title").text_content() == f"Search for {name}"
    assert part.locator(".said b").inner_text() == name
    part.get_by_label("outcome").select_option("refused")
    assert 0 < part.locator("tbody tr").count() < 48
    card = opened.page.locator(".design[data-task]").first
    card.get_by_role("button", name="turn it in 3D").click()
    assert part.locator(".said b").inner_text() in card.inner_text().replace("</s>", " on ")


def test_training_curves_tell_their_numbers(opened: Opened) -> None:
    part = opened.part("training")
    assert part.locator("svg").count() == 12
    part.get_by_role("button", name="GRPO", exact=True).click()
    assert part.locator("svg").count() == 3
    part.locator("svg").nth(1).hover()
    assert re.match(r"GRPO, step \d+\nmean reward R [\d.]+", opened.page.locator(".tip").inner_text())


def test_it_prints(opened: Opened) -> None:
    pdf = opened.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 40
    opened.page.emulate_media(media="print")
    assert not opened.page.locator(".stage").first.is_visible()
    assert opened.page.locator("[data-live=parity] svg").is_visible()
    opened.page.emulate_media(media="screen")


def test_a_phone_needs_no_scrolling_sideways_and_a_dark_page_is_dark(browser: Any, report: Path) -> None:
    phone = Opened(browser, report, width=390, color_scheme="dark", has_touch=True)
    height = phone.page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 800):  # so that everything is made that is made when it is seen
        phone.page.evaluate(f"scrollTo(0, {y})")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390

    def light(what: str) -> float:
        colour = phone.page.evaluate(
            f"getComputedStyle(document.{what}).{'backgroundColor' if what != 'body' else 'color'}"
        )
        parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

    paper, ink = light("documentElement"), light("body")
    assert paper < 0.05 and (ink + 0.05) / (paper + 0.05) > 7  # WCAG's contrast AAA
    assert phone.wrong == []
    phone.page.close()


def test_a_browser_without_webgl_says_so(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(report.as_uri())
    stage = page.locator("[data-live=parity] .stage")
    stage.scroll_into_view_if_needed()
    stage.get_by_text("This browser shows no WebGL").wait_for()
    assert page.locator("[data-live=answers] tbody tr").count() == 100  # the rest is as live as ever
    page.close()


def test_without_scripts_the_figures_are_there(browser: Any, report: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(report.as_uri())
    for name in ("parity", "training"):
        assert page.locator(f"[data-live={name}] figure svg").is_visible()
    page.close()
