"""The page that solves in the browser, in a real Chromium: its pictures are Python's, and anyone can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Browser, Page

import jacobiflow as jf
from demo import live_page
from tests.helpers.chromium import CHROMIUM, chromium, served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    live_page.build(folder)
    with served(folder) as address:
        yield f"{address}/index.html?threads=1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Page:
    """A page of a phone's width."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#draw:enabled")
    return page


def test_pictures_are_those_of_python(page: Page) -> None:
    """From the keyboard: the class, the seed, and the button, in the order of the page."""
    page.locator("#class").focus()
    for key in ("ArrowUp", "Tab", "ControlOrMeta+a", "7", "Tab", "Tab"):  # from ankle boots to bags; the seed
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status").startswith("Done")

    flow, labels = jf.load(live_page.MODEL), torch.tensor([8])
    latents = torch.tensor(page.evaluate("[...jacobiflow.latents]")).view(1, flow.config.num_tokens, -1)
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.1
    expected = jf.sample(flow, latents=latents, labels=labels, strategy="sequential").images
    calls = {}
    for loop in ("parallel", "sequential"):
        result = page.evaluate(f"({{ ...jacobiflow.{loop}, image: [...jacobiflow.{loop}.image] }})")
        image = flow.from_tokens(torch.tensor(result["image"]).view(latents.shape))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)
        assert 0 < result["certificate"] <= 3e-5
        assert f"{result['certificate']:.1e}".replace("e-0", "e-") == page.inner_text(f"#{loop} .certificate")
        calls[loop] = result["calls"]
    assert calls["sequential"] == 8 * 196  # 195 tokens, and a certificate
    assert calls["parallel"] < calls["sequential"] / 2


def test_fits_a_phone_and_can_be_stopped(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.check("#slow")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#parallel .progress').textContent.startsWith('Block')")
    page.click("#stop")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status") == "Stopped."
    assert page.inner_text("#parallel .certificate") == "–"


def test_missing_files_and_features_are_named(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-*.bin", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.click("#draw:enabled")
    page.wait_for_selector("#status.failed")
    assert re.search(r"model/weights-\w+\.bin: 404", page.inner_text("#status"))
    page.add_init_script("delete window.WebAssembly")
    page.reload()
    page.wait_for_selector("#status.failed")
    assert "no WebAssembly" in page.inner_text("#status")
