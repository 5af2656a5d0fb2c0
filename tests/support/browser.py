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

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [
    *(["Chromium (Debian: apt install chromium)"] if CHROMIUM is None else []),
    *(["playwright (pip install playwright)"] if find_spec("playwright") is None else []),
]
needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' and '.join(MISSING)}")


@contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """A file in the browser; ``page.problems`` lists what its console says, and every request beyond the file.

    ``options``: of playwright's ``new_page``.
    """
    from playwright.sync_api import sync_playwright

    def requested(url: str) -> None:
        if not url.startswith("data:") and url.split("#")[0] != file.as_uri():
            page.problems.append(f"request: {url[:80]}")

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # also for root in containers
        page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        page.problems = []
        page.on("console", lambda message: page.problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
        page.on("request", lambda request: requested(request.url))
        page.goto(file.as_uri())
        try:
            yield page
        finally:
            browser.close()


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        shares = [channel / 255 for channel in ImageColor.getrgb(colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)
