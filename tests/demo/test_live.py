"""The page that solves in the browser, in a real Chromium: its pictures are Python's, and whoever comes can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page

import jacobiflow as jf
from demo import live_page
from tests.helpers.chromium import CHROMIUM, chromium, served

PAGE = Path(__file__).resolve().parents[2] / "demo" / "page"
DRAWN = "({ ...jacobiflow, latents: [...jacobiflow.latents], parallel: { ...jacobiflow.parallel, denoised: " \
    "[...jacobiflow.parallel.denoised] }, sequential: { ...jacobiflow.sequential, denoised: " \
    "[...jacobiflow.sequential.denoised] } })"  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    live_page.build(folder)
    with served(folder) as address:
        yield f"{address}/index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Page:
    """A page of a phone's width."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.goto(f"{address}?threads=1")
    page.wait_for_selector("#draw:enabled")
    return page


def test_pictures_are_those_of_python(page: Page) -> None:
    """From the keyboard: the class, the seed, and the button, in the order of the page."""
    page.locator("#class").focus()
    page.keyboard.press("ArrowUp")  # from ankle boots to bags
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("7")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status").startswith("Done")
    drawn = page.evaluate(DRAWN)
    assert (drawn["label"], drawn["seed"]) == (8, 7)

    flow = jf.load(live_page.MODEL)
    latents = torch.tensor(drawn["latents"]).view(1, flow.config.num_tokens, -1)
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.1
    labels = torch.tensor([8])
    expected = jf.sample(
        flow.guided(flow.recommended.guidance), latents=latents, labels=labels, strategy="sequential", denoise=1.0
    ).images
    for loop in ("parallel", "sequential"):
        tokens = torch.tensor(drawn[loop]["denoised"]).view(latents.shape)
        torch.testing.assert_close(flow.to_images(tokens), expected, rtol=0, atol=1e-3)
        assert 0 < drawn[loop]["certificate"] <= 3e-5
        assert f"{drawn[loop]['certificate']:.1e}".replace("e-0", "e-") == page.inner_text(f"#{loop} .certificate")
    assert drawn["sequential"]["calls"] == 8 * 196  # 195 tokens, and a certificate
    assert drawn["parallel"]["calls"] < drawn["sequential"]["calls"] / 2


def test_fits_a_phone_and_can_be_stopped(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.check("#slow")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#parallel .progress').textContent.startsWith('Block')")
    page.click("#stop")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status") == "Stopped."
    assert page.inner_text("#parallel .certificate") == "–"
    assert not page.evaluate(
        "document.querySelector('#parallel canvas').getContext('2d').getImageData(0, 0, 28, 28).data.some(Boolean)"
    )


def test_what_is_missing_is_said(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-*.bin", lambda route: route.fulfill(status=404))
    page.goto(f"{address}?threads=1")
    page.click("#draw:enabled")
    page.wait_for_selector("#status.failed")
    assert re.search(r"model/weights-\w+\.bin: 404", page.inner_text("#status"))
    page.add_init_script("delete window.WebAssembly")
    page.reload()
    page.wait_for_selector("#status.failed")
    assert "no WebAssembly" in page.inner_text("#status")


def test_the_solver_is_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in PAGE.glob("*.js")) <= 300
