"""The page "See it solve" in a real Chromium: it plays a recorded solve, and its pictures are Python's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page

pytest.importorskip("zensical", reason="needs Python 3.11")

import jacobiflow as jf
from jacobiflow.data import quantize
from tools.chromium import CHROMIUM, chromium, served
from tools.docs import website
from tools.page import live_page
from tools.page.recording import LABEL, SEED, SOLVER, page_latents

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = website.build(tmp_path_factory.mktemp("site")) / "live"
    live_page.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder.parent) as address:
        yield f"{address}/live/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Page:
    """A page of a phone's width, without motion."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#draw:enabled")
    return page


@pytest.fixture(scope="module")
def flow() -> jf.TarFlow:
    return jf.load(live_page.MODEL)


def test_the_recording_is_a_solve_and_needs_no_model(
    browser: Browser, address: str, folder: Path, flow: jf.TarFlow, one_thread: None
) -> None:
    size = sum(path.stat().st_size for name in ("model", "ort") for path in (folder / name).iterdir())
    assert (folder / "recording.json").stat().st_size < 100_000 < size
    page, requests = browser.new_page(reduced_motion="reduce"), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("#recording button:enabled")
    page.wait_for_selector("#draw:enabled")
    assert f"fetches {size / 1e6:.0f} MB" in page.inner_text("#draw")
    assert page.inner_text("#recording .progress").startswith("Done"), "without motion it shows the end"
    latents, strategy = page_latents(flow, SEED), jf.Strategy.uniform(SOLVER, flow.config.num_blocks)
    sweeps, exact = (jf.sample(flow, latents=latents, labels=LABEL, strategy=each) for each in (strategy, "sequential"))
    calls = [f"{samples.network_calls:,}" for samples in (sweeps, exact)]
    assert [page.inner_text(f"#recording .{name}") for name in ("calls", "exact-calls")] == calls
    assert "{} network calls instead of {},".format(*calls) in page.inner_text("article")
    pixels = page.evaluate("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 28, 28).data]")
    picture = torch.tensor(pixels).view(28, 28, 4)[..., 0]
    torch.testing.assert_close(picture, quantize(exact.images[0, 0]).long(), rtol=0, atol=1)

    page.click("#recording button")
    page.wait_for_function("document.querySelector('#recording .progress').textContent.startsWith('Block 2')")
    page.click("#recording button")
    count = int(page.inner_text("#recording .calls"))
    assert 0 < count < sweeps.network_calls and page.input_value("#recording input") == str(count)
    assert not [url for url in requests if "/model/" in url or "/ort" in url]
    page.emulate_media(reduced_motion="no-preference")
    page.reload()
    page.locator("#recording button", has_text="Pause").wait_for()  # it plays by itself


def test_pictures_are_those_of_python(page: Page, flow: jf.TarFlow) -> None:
    """From the keyboard: the class, the seed, the device, the box, and the button, in the order of the page."""
    page.locator("#class").focus()
    keys = ("ArrowUp", "Tab", "ControlOrMeta+a", "7", "Tab", "Tab", "Space", "Tab")  # ankle boots to bags; the seed
    for key in keys:
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status").startswith("Done")

    latents = torch.tensor(page.evaluate("[...jacobiflow.latents]")).view(1, flow.config.num_tokens, -1)
    torch.testing.assert_close(latents, page_latents(flow, 7))
    assert abs(float(latents.mean())) < 0.15
    assert abs(float(latents.std()) - 1) < 0.1
    expected = jf.sample(flow, latents=latents, labels=8, strategy="sequential").images
    calls = {}
    for loop in ("sweeps", "exact"):
        result = page.evaluate(f"({{ ...jacobiflow.{loop}, image: [...jacobiflow.{loop}.image] }})")
        image = flow.from_tokens(torch.tensor(result["image"]).view(latents.shape))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)
        assert 0 < result["residual"] <= 3e-5
        assert f"{result['residual']:.1e}".replace("e-0", "e-") == page.inner_text(f"#results .{loop}.residual")
        calls[loop] = result["calls"]
    assert calls["exact"] == 8 * 196  # 195 tokens, and a certificate
    assert calls["sweeps"] < calls["exact"] / 2


def test_webgpu_draws_the_pictures_of_python(
    browser: Browser, address: str, folder: Path, flow: jf.TarFlow, tmp_path: Path, one_thread: None
) -> None:
    """One block of the model, since a call takes about a second on a software adapter."""
    short = jf.TarFlow(replace(flow.config, num_blocks=1))
    short.load_state_dict({name: value for name, value in flow.state_dict().items() if name in short.state_dict()})
    short.recommended = flow.recommended
    live_page.export(short, tmp_path, flow.recommended.guidance)
    size = sum(path.stat().st_size for name in ("model", "ort-webgpu") for path in (folder / name).iterdir())
    args = ["--no-sandbox", "--enable-unsafe-webgpu"]
    with browser.browser_type.launch(executable_path=CHROMIUM, args=args) as gpu_browser:
        page = gpu_browser.new_page()
        page.goto(address)
        if not page.evaluate("navigator.gpu?.requestAdapter().then((adapter) => adapter !== null)"):
            pytest.skip("this Chromium has no software adapter for WebGPU")
        page.route("**/model/*", lambda route: route.fulfill(path=tmp_path / Path(route.request.url).name))
        page.locator("#device option:enabled", has_text="GPU").wait_for(state="attached")
        page.select_option("#device", "gpu")
        assert f"fetches {size / 1e6:.0f} MB" in page.inner_text("#draw")
        page.click("#draw")
        page.wait_for_selector("#draw:enabled", timeout=120_000)
        assert page.inner_text("#status").startswith("Done")
        image, residual = page.evaluate("[[...jacobiflow.sweeps.image], jacobiflow.sweeps.residual]")
    expected = jf.sample(short, latents=page_latents(flow, SEED), labels=LABEL, strategy="sequential").images
    torch.testing.assert_close(short.to_tokens(expected).flatten(), torch.tensor(image), rtol=0, atol=1e-3)
    assert 0 < residual <= 3e-5


def test_fits_a_phone_and_can_be_stopped(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#draw")
    page.wait_for_function("document.querySelector('#progress').textContent.startsWith('Block')")
    page.click("#stop")
    page.wait_for_selector("#draw:enabled")
    assert page.inner_text("#status") == "Stopped."
    assert page.inner_text("#results .sweeps.residual") == "–"


def test_threads_are_used_if_asked_for(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}?threads=2")
    page.wait_for_selector("#draw:enabled")
    assert page.evaluate("crossOriginIsolated")
    page.goto(address)  # the page that isolates is still there, and so is the search
    page.wait_for_selector("#draw:enabled")
    page.locator(".md-search__button").click()
    page.get_by_role("combobox", name="Search").fill("certificate")
    page.locator("[role=option][href*='/solvers/']").first.wait_for()


def test_missing_files_and_features_are_named(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/weights-*.bin", lambda route: route.fulfill(status=404))
    page.route("**/recording.json", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.click("#draw:enabled")
    page.wait_for_selector("#status.live-failed")
    assert re.search(r"model/weights-\w+\.bin: 404", page.inner_text("#status"))
    assert "recording.json: 404" in page.inner_text("#recording .progress")
    page.add_init_script("delete window.WebAssembly")
    page.reload()
    page.wait_for_selector("#status.live-failed")
    assert "no WebAssembly" in page.inner_text("#status")
