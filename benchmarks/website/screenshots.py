"""Pictures of every page of the built site, on a desktop and on a phone: `python -m website.screenshots`.

They are written to out/screenshots, and the top of each to docs/figures/site.png. A page that is wider than its window
is named. benchmarks/ has to be in PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from chromium import chromium, served
from PIL import Image
from playwright.sync_api import Browser

from jacobiflow.plots import save_png

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (1280, 390)
_COLUMNS, _SIZES = 8, ((213, 180), (65, 180))  # of the overview, and of a page in it by width


def look(browser: Browser, address: str, names: Iterable[str], width: int, pictures: Path) -> list[str]:
    """Takes a picture of each page.

    Returns what is wrong: too wide for the window, a message in the console, a failed request.
    """
    wrong = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.text}"))
    page.on("requestfailed", lambda request: wrong.append(f"{page.url}: {request.url} failed"))
    for name in names:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        wide = page.evaluate("document.documentElement.scrollWidth")
        wrong += [f"{name} is {wide} pixels wide in a window of {width}"] * (wide > width)
        picture = name.removesuffix("/index.html").removesuffix(".html").replace("/", "-")
        page.screenshot(path=pictures / str(width) / f"{picture}.png", full_page=True)
    page.close()
    return wrong


def overview(pictures: Path) -> Image.Image:
    """The tops of all pages, each as on a desktop and beside it as on a phone."""
    names = sorted(path.name for path in (pictures / str(WIDTHS[0])).glob("*.png"))
    across, down = sum(width for width, _ in _SIZES) + 12, _SIZES[0][1] + 8
    sheet = Image.new("RGB", (_COLUMNS * across, -(-len(names) // _COLUMNS) * down), "gray")
    for i, name in enumerate(names):
        left, top = i % _COLUMNS * across + 4, i // _COLUMNS * down + 4
        for window, (width, height) in zip(WIDTHS, _SIZES, strict=True):
            page = Image.open(pictures / str(window) / name).convert("RGB")
            shown = page.crop((0, 0, window, window * height // width))
            sheet.paste(shown.resize((width, height), Image.Resampling.LANCZOS), (left, top))
            left += width + 4
    return sheet.quantize(64)


def main(site: Path = ROOT / "out/site", pictures: Path = ROOT / "out/screenshots") -> None:
    """Takes the pictures; exits 1 with what is wrong."""
    names = [str(file.relative_to(site)) for file in sorted(site.rglob("*.html"))]
    with served(site) as address, chromium() as browser:
        wrong = [line for width in WIDTHS for line in look(browser, address, names, width, pictures)]
    save_png(overview(pictures), ROOT / "docs/figures/site.png")
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
