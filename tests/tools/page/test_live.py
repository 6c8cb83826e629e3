"""The page "See it solve" in a real Chromium: it races two samplers by itself, and its pictures are Python's."""

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
    """A page of a phone's width, after the race that it runs when it is loaded."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.add_init_script(
        "shift = 0;"
        "new PerformanceObserver((list) => list.getEntries().forEach(({ value }) => (shift += value)))"
        ".observe({ type: 'layout-shift', buffered: true })"
    )
    page.goto(address)
    page.wait_for_selector("#reason:not(:empty)")
    return page


def test_the_model_is_small_and_the_page_says_how_small(page: Page, site: Path) -> None:
    folders = (site / "live" / name for name in ("model", "ort"))
    model, runtime = (sum(path.stat().st_size for path in folder.iterdir()) / 1e6 for folder in folders)
    assert model < 3
    text = page.inner_text("article")
    assert f"The model takes {model:.1f} MB" in text
    assert f"runs it, takes {runtime:.1f} MB" in text


def test_the_page_says_who_won_and_why(page: Page) -> None:
    seconds, calls = (
        {name: page.evaluate(f"jacobiflow.{name}.{value}") for name in ("exact", "sweeps")}
        for value in ("seconds", "calls")
    )
    winner = "Sweeps" if seconds["sweeps"] < seconds["exact"] else "Token by token"
    assert page.inner_text("#outcome") == (
        f"Token by token: {seconds['exact']:.2f} s. Sweeps: {seconds['sweeps']:.2f} s. {winner} won here."
    )
    assert f"Sweeps made {calls['sweeps']} calls instead of {calls['exact']:,}" in page.inner_text("#reason")
    assert page.inner_text("#race .exact .seconds") == f"{seconds['exact']:.2f} s"


def test_nothing_moves_when_the_pictures_come_and_the_page_fits_a_phone(page: Page) -> None:
    assert page.evaluate("shift") < 0.01
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pictures_are_those_of_python(page: Page) -> None:
    """From the keyboard: another class, then another picture of it."""
    page.evaluate("document.querySelector('#reason').textContent = ''")
    page.locator("#class").focus()
    for key in ("ArrowDown", "Tab", "Enter"):  # sneakers to bags
        page.keyboard.press(key)
    page.wait_for_selector("#reason:not(:empty)")

    flow = jf.load(live_page.MODEL)
    for parameter in flow.parameters():
        parameter.data = torch.mul(*round_rows(parameter.data)) if parameter.ndim == 2 else parameter.data
    latents = torch.tensor(page.evaluate("[...jacobiflow.latents]")).view(1, flow.config.num_tokens, -1)
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.1
    expected = jf.sample(flow, latents=latents, labels=8, strategy="sequential")
    for name, atol in (("exact", 1e-3), ("sweeps", 20 * live_page.TOLERANCE)):
        image = torch.tensor(page.evaluate(f"[...jacobiflow.{name}.image]")).view(latents.shape)
        torch.testing.assert_close(flow.from_tokens(image), expected.images, rtol=0, atol=atol)
    exact, sweeps = (page.evaluate(f"jacobiflow.{name}.calls") for name in ("exact", "sweeps"))
    assert exact == 8 * 195  # the first token of a block needs no call
    assert sweeps < exact


def test_missing_files_are_named(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-*", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.locator("#outcome", has_text="did not work").wait_for()
    assert re.search(r"model/weights-\d-\w+\.gz: 404", page.inner_text("#outcome"))
