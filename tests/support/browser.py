"""Headless Chromium for what only a browser can tell. Debian's ``chromium`` is enough; its driver is playwright's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageColor

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [
    *(["Chromium (Debian: apt install chromium)"] if CHROMIUM is None else []),
    *(["playwright (pip install playwright)"] if find_spec("playwright") is None else []),
]
needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' and '.join(MISSING)}")


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """A page of a browser that has just started. ``options``: of playwright's ``new_page``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # also for root in containers
        try:
            yield browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        finally:
            browser.close()


@contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """A file in the browser; ``page.problems`` lists what its console says, and every request beyond the file."""
    with chromium(**options) as page:
        problems: list[str] = []
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda r: problems.append(f"request: {r.url[:80]}") if outside(r.url, file) else None)
        page.problems = problems
        page.goto(file.as_uri())
        yield page


def outside(url: str, file: Path) -> bool:
    """Whether a request leaves the file; reading the file itself and pictures within it do not."""
    return not url.startswith("data:") and url.split("#")[0] != file.as_uri()


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        shares = [channel / 255 for channel in ImageColor.getrgb(colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)
