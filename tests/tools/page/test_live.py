"""The page "Race in your browser" in a real Chromium: two samplers race, and their pictures are Python's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page

pytest.importorskip("zensical", reason="needs Python 3.11")

import jacobiflow as jf
from tools.chromium import CHROMIUM, chromium, served
from tools.page import live_page
from tools.page.graphs import round_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield f"{address}/live/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Page:
    """A page of a phone's width, after its first race."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.add_init_script(
        "shift = 0;"
        "new PerformanceObserver((list) => list.getEntries().forEach(({ value }) => (shift += value)))"
        ".observe({ type: 'layout-shift', buffered: true })"
    )
    start(page, address)
    page.wait_for_selector("#result:not(:empty)")
    return page


def start(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("button", name="Start the race").click()


def test_the_model_is_small_and_the_page_says_how_small(page: Page, site: Path) -> None:
    folders = (site / "live" / name for name in ("model", "ort"))
    model, runtime = (sum(path.stat().st_size for path in folder.iterdir()) / 1e6 for folder in folders)
    assert model < 3
    text = page.inner_text("article")
    assert f"The model and jacobiflow take {model:.1f} MB" in text
    assert f"ONNX Runtime Web takes {runtime:.1f} MB" in text


def test_the_page_says_how_much_faster_jacobiflow_is(page: Page) -> None:
    original, fast = (page.evaluate(f"jacobiflow.{name}.seconds") for name in ("original", "jacobiflow"))
    assert page.inner_text("#outcome") == f"jacobiflow was {original / fast:.1f} times faster here."
    result = page.inner_text("#result")
    assert result.startswith(f"Original: {original:.2f} s. jacobiflow: {fast:.2f} s. Same picture: no pixel")
    assert page.inner_text("#race .original .seconds") == f"{original:.2f} s"


def test_a_picture_and_the_progress_are_shown_until_the_model_is_loaded(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-0-*", lambda route: None)
    start(page, address)
    page.locator("#outcome", has_text=re.compile(r"Loading the model: 1[67]\.\d of 17\.\d MB")).wait_for()
    assert page.locator("#still").is_visible()
    assert page.get_by_role("button", name="Start the race").is_disabled()
    assert not page.locator("#race").is_visible()
    assert 0.9 < page.evaluate("document.querySelector('#loading').value") < 1


def test_nothing_moves_when_the_pictures_come_and_the_page_fits_a_phone(page: Page) -> None:
    assert page.evaluate("shift") < 0.01
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_are_those_of_python(page: Page) -> None:
    """From the keyboard: another class, then another picture of it."""
    page.evaluate("document.querySelector('#result').textContent = ''")
    page.locator("#class").focus()
    for key in ("ArrowDown", "Tab", "Enter"):  # sneakers to bags
        page.keyboard.press(key)
    page.wait_for_selector("#result:not(:empty)")

    flow = jf.load(live_page.MODEL)
    for parameter in flow.parameters():
        parameter.data = torch.mul(*round_rows(parameter.data)) if parameter.ndim == 2 else parameter.data
    latents = torch.tensor(page.evaluate("[...jacobiflow.latents]")).view(1, flow.config.num_tokens, -1)
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.1
    expected = jf.sample(flow, latents=latents, labels=8, strategy="sequential")
    for name in ("original", "jacobiflow"):
        image = torch.tensor(page.evaluate(f"[...jacobiflow.{name}.image]")).view(latents.shape)
        torch.testing.assert_close(flow.from_tokens(image), expected.images, rtol=0, atol=1e-3)


def test_missing_files_are_named(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-*", lambda route: route.fulfill(status=404))
    start(page, address)
    page.locator("#outcome", has_text="did not work").wait_for()
    assert re.search(r"model/weights-\d-\w+\.gz: 404", page.inner_text("#outcome"))
