"""Pictures of the report page and of TensorBoard for the README, of a run that is there.

    python train_examples/quickstart.py && python train_examples/evidence/screenshots.py

It takes a Chromium on the PATH (Debian: apt install chromium) and the extra "test". Written are ``report-light.png``,
``report-dark.png`` and ``tensorboard.png``, beside ``quickstart.png``, the overview of the run's last event.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image

from memwatch.report.page import write_page

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = {"width": 1280, "height": 1120}
SHOWN_TAGS = "row-00105|row-00135|row-00002|overview"
PORT = 6016
PATIENCE = 60  # seconds until TensorBoard answers


def main() -> int:
    """0, or 2 where there is nothing to take a picture of, or nothing to take it with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=ASSETS, help="default: %(default)s")
    args = parser.parse_args()
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        print(f"screenshots: none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 2
    overviews = sorted((args.run / "memwatch" / "overview").glob("step_*.jpg"))
    if not overviews:
        print(f"screenshots: {args.run} holds no finished run; run train_examples/quickstart.py first", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    Image.open(overviews[-1]).save(args.output / "quickstart.png")
    with browser(executable) as chromium:
        for scheme in ("light", "dark"):
            report(chromium, args.run / "memwatch", scheme, args.output / f"report-{scheme}.png")
        with tensorboard(args.run / "logs") as address:
            dashboard(chromium, address, args.output / "tensorboard.png")
    print(f"pictures: {args.output}")
    return 0


@contextmanager
def browser(executable: str) -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def report(chromium: Any, folder: Path, scheme: str, file: Path) -> None:
    """The top of the report page; the dark one compares with the event before."""
    page = chromium.new_page(viewport=SIZE, color_scheme=scheme)
    page.goto(write_page(folder).resolve().as_uri())
    if scheme == "dark":
        page.select_option("#before", "1")
        page.locator(".line[data-probe='1']").first.dispatch_event("mouseenter")
    page.screenshot(path=file)
    page.close()
    shrink(file)


def dashboard(chromium: Any, address: str, file: Path) -> None:
    """TensorBoard's pictures of a run."""
    page = chromium.new_page(viewport=SIZE)
    page.goto(f"{address}/?darkMode=false#images")
    page.locator("tf-tag-filterer input").fill(SHOWN_TAGS)
    page.wait_for_timeout(6000)  # TensorBoard loads card by card, and has no sign for the last one
    page.screenshot(path=file)
    page.close()
    shrink(file)


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """A TensorBoard of these logs; its address."""
    options = ["--logdir", str(logs), "--port", str(PORT), "--host", "127.0.0.1"]
    command = [sys.executable, "-m", "tensorboard.main", *options, "--samples_per_plugin", "images=1000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{PORT}"
    try:
        wait_for(address, process)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers.

    Raises:
        RuntimeError: it does not.
    """
    for _ in range(10 * PATIENCE):
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, ConnectionError, TimeoutError):
            if process.poll() is not None:
                break
            time.sleep(0.1)
    raise RuntimeError(f"TensorBoard does not answer at {address}; is the port free?")


def shrink(file: Path) -> None:
    """As small as the format can be without losing anything."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.save(file, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
