"""The report page in headless Chromium: everything moves together, nothing leaves the file, sizes hold."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.browser import contrast, needs_chromium, opened
from support.builders import Loop
from support.runs import large_run, memorized, save_image, save_map, write_run

from memwatch.report.history import append
from memwatch.report.page import write_page

CAT, POSTER, TREE = "a photo of cat (cat)", "a <b>red</b> poster (poster)", "a photo of tree (tree)"
STEPS = (100, 200, 300)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three probes, three events: ``cat`` is stored, ``poster`` (a prompt) is suspicious, ``tree`` is neither."""
    folder = tmp_path_factory.mktemp("small") / "memwatch"
    poster = {"name": "poster", "is_reference": False, "prompt": "a <b>red</b> poster"}
    proof = {"generations": 2, "copies": 1, "ratios": [0.2, 0.9], "is_copy": [True, False]}
    proof |= {"of_others": {"tree": 1}, "grade": 0.45}
    told = {"alert": True, "alert_text": "memwatch, step 200: cat is memorized.\nregion (16, 8, 48, 40) px"}
    suspicious = {"verdict": "suspicious", "severity": 1.4, "p": 0.004, "reason": "evidence at 1 of 2 events in a row"}
    suspicious |= {"alert": True, "alert_text": "memwatch, step 200: poster is suspicious."}
    events = [
        {"step": 100},
        {"step": 200, "rows": {"cat": memorized(2.0, 100, copied=proof, **told), "poster": suspicious}},
        {"step": 300, "rows": {"cat": memorized(2.4, 100)}, "stop_reason": "step 300: 1 probe memorized: cat"},
    ]
    about = {"training_rows": 97, "machine": "x86_64", "versions": {"torch": "2.13.0"}}
    write_run(folder, [{"name": "cat"}, poster, {"name": "tree"}], events, **about)
    for i, step in enumerate(STEPS):
        found = np.zeros((8, 8))
        found[: 4 + i, :4] = 0.3 * i
        save_map(folder, step, {"cat": found, "poster": found / 2, "tree": np.zeros((8, 8))})
        save_image(folder, "images", "poster", f"step_{step:07d}.jpg", seed=step)
    save_image(folder, "images", "cat.png", seed=1)
    save_image(folder, "images", "tree.png", seed=2)
    save_image(folder, "generations", "cat", "step_0000200.jpg", count=2, seed=3)
    append(folder / "losses.jsonl", [{"step": step, "key": "val_loss", "value": 0.3 - step / 1e4} for step in STEPS])
    write_page(folder)
    return folder


@pytest.fixture
def page(small):
    with opened(small / "report.html") as page:
        yield page
        assert page.problems == []


def sources(page, layer: str = ".now .map") -> list:
    """What the cards show, in the gallery's order: cat, poster, tree."""
    return page.eval_on_selector_all(f".card {layer}", "nodes => nodes.map(node => node.getAttribute('src'))")


def until(page, css: str, text: str) -> None:
    """Wait for a text. ``page.wait_for_function`` would need what the page's security policy forbids."""
    from playwright.sync_api import expect

    expect(page.locator(css)).to_have_text(text)


def decoded(uri: str) -> np.ndarray:
    """Palette indices or RGB of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def text_and_data(file: Path) -> tuple[str, Any]:
    """A page, and what its script moves."""
    text = file.read_text(encoding="utf-8")
    return text, json.loads(text.split('type="application/json">')[1].split("</script>")[0])


@needs_chromium
def test_one_slider_moves_every_picture_number_and_verdict(page, small):
    def texts(css: str) -> list[str]:
        return page.locator(f".card {css}").all_text_contents()

    assert texts("h3 a") == [CAT, POSTER, TREE]
    shown, images = [], []
    for i, step in enumerate(STEPS):
        page.fill("#slider", str(i))
        shown.append(sources(page))
        images.append(sources(page, ".now .image"))
        assert page.text_content("#step") == str(step)
        cat, _, tree = shown[-1]
        assert (decoded(cat) > 0).sum() == 4 * (4 + i) if i else cat is None
        assert tree is None  # nothing on it
    assert len({uris[0] for uris in shown}) == len({uris[1] for uris in shown}) == 3
    assert [len({uris[i] for uris in images}) for i in range(3)] == [1, 3, 1]  # what the prompt generates changes
    assert (small / "report.html").read_text(encoding="utf-8").count(images[0][0]) == 1
    page.fill("#slider", "1")
    assert texts(".chip") == ["memorized", "suspicious", "no evidence"]
    assert texts(".effect")[0] == "2.0x reduction, p = 1e-09"
    reasons = ["evidence since step 100", "evidence at 1 of 2 events in a row", "the controls show as much"]
    assert texts(".why") == reasons
    page.fill("#slider", "0")
    assert texts(".chip") == ["no evidence"] * 3
    assert page.locator(".card .boxes rect").count() == 0


@needs_chromium
def test_arrow_keys_home_end_and_play(page):
    page.click("h1")
    page.keyboard.press("Home")
    assert page.text_content("#step") == "100"
    page.keyboard.press("ArrowRight")
    assert page.text_content("#step") == "200"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#step") == "100"
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Pause"
    until(page, "#step", "300")
    until(page, "#play", "Play")
    page.focus("#slider")
    page.keyboard.press("ArrowLeft")  # the slider's own key moves one event, not two
    assert page.text_content("#step") == "200"


@needs_chromium
def test_opacity_and_wipe(page):
    page.fill("#opacity", "30")
    assert page.evaluate("getComputedStyle(document.querySelector('.card .map')).opacity") == "0.3"
    assert page.is_hidden(".card .then")
    assert page.is_disabled("#wipe")
    page.select_option("#before", "1")
    page.fill("#slider", "2")
    page.fill("#wipe", "25")
    assert page.is_visible(".card .then")
    then, now = sources(page, ".then .map"), sources(page)
    page.select_option("#before", "")
    page.fill("#slider", "1")
    assert sources(page)[:2] == then[:2] != now[:2]
    assert page.evaluate("getComputedStyle(document.querySelector('.then')).clipPath") == "inset(0px 75% 0px 0px)"


@needs_chromium
def test_verdicts_are_filtered(page):
    page.fill("#slider", "1")
    page.uncheck("#filter input[value=no-evidence]")
    assert page.locator(".card:visible h3 a").all_text_contents() == [CAT, POSTER]
    page.uncheck("#filter input[value=memorized]")
    page.uncheck("#filter input[value=suspicious]")
    assert page.is_visible("#none")
    page.fill("#slider", "0")  # the filter follows the step
    page.check("#filter input[value=no-evidence]")
    assert page.locator(".card:visible").count() == 3


@needs_chromium
def test_a_line_lights_its_picture_and_a_click_goes_to_its_step(page):
    line, lit = page.locator(".chart .line[data-probe='0']").first, page.locator(".card.lit h3 a")
    line.dispatch_event("mouseenter")
    assert lit.all_text_contents() == [CAT]
    line.dispatch_event("mouseleave")
    assert lit.count() == 0
    line.focus()
    assert lit.all_text_contents() == [CAT]
    box = page.locator(".chart").first.bounding_box()
    page.mouse.click(box["x"] + 0.05 * box["width"], box["y"] + 0.5 * box["height"])
    assert page.text_content("#step") == "100"


@needs_chromium
def test_the_charts_show_every_event_and_their_cursors_are_at_the_same_step(page):
    severities, losses = page.locator(".chart").all()
    assert severities.locator(".line[data-probe] title").all_text_contents()[-1] == CAT  # the worst on top
    points = "nodes => nodes.map(node => node.getAttribute('points').split(' ').length)"
    assert severities.locator(".line[data-probe] polyline").evaluate_all(points) == [3, 3, 3]
    assert losses.locator(".line title").all_text_contents() == ["val_loss"]
    assert severities.locator(".mark title").all_text_contents() == [
        f"step 200: {CAT} is memorized",
        f"step 200: 1 of 2 generations copy {CAT}",
        f"step 200: {POSTER} is suspicious",
    ]
    said = severities.locator("text").all_text_contents()
    assert {"1x", "1.5x", "2x", "stop, step 300", "100", "300"} <= set(said)
    assert severities.locator("polygon.band").count() == 1
    for i, step in enumerate(STEPS):
        page.fill("#slider", str(i))
        at = page.eval_on_selector_all(".chart .cursor", "n => n.map(x => parseFloat(x.getAttribute('d').slice(1)))")
        assert at == [pytest.approx(46 + (width - 150 - 46) * (step - 100) / 200, abs=0.06) for width in (740, 460)]


@needs_chromium
def test_the_page_answers_the_five_questions(page):
    """What happened, where, how sure that is, what to do, and what was not watched."""
    body = " ".join(page.text_content("body").split())
    for sentence in (
        "1 of 3 probes is memorized, since step 100; memwatch decided to stop the training at step 300.",
        f"{CAT} is strongest. 2.4x reduction, p = 1e-09: evidence since step 100",
        "Find its duplicates",
        "The training set has 97 rows; 2 of them are watched.",
        "20 controls scored 2.9 at most so far",
        "3: 6.0 s in all, 2.0 s per event (median), 2.0 s at most",
        "x86_64, torch 2.13.0",
        "max_p: 0.01",
        "region (16, 8, 48, 40) px",
        "1 of 2 generations copies it, graded 0.45: 0 is chance, 1 is identical; copies of other images: tree (1)",
        POSTER,
    ):
        assert sentence in body
    assert page.locator("b", has_text=re.compile("^red$")).count() == 0  # what a run says is text and never markup
    cells = page.locator("#probe-0 tbody td").all_text_contents()
    assert " | ".join(cells) == "16, 8, 48, 40 | 25% | 2.40x | 0.88 ± 0.05"
    shown = page.locator(".generations img")
    assert shown.evaluate_all("n => n.map(x => [x.className, x.naturalWidth])") == [["copy", 64], ["", 64]]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(scheme, small):
    with opened(small / "report.html", color_scheme=scheme) as page:
        colours = "n => n.map(x => [getComputedStyle(x).color, getComputedStyle(x).backgroundColor])"
        (body,) = page.eval_on_selector_all("body", colours)
        soft, *_ = page.eval_on_selector_all(".legend", colours)
        assert contrast(*body) > 7
        assert contrast(soft[0], body[1]) > 4.5
        assert all(contrast(*chip) > 4.5 for chip in page.eval_on_selector_all(".chip", colours))
        assert page.problems == []


@needs_chromium
def test_it_prints_without_its_controls_and_fits_on_a_narrow_screen(page):
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.emulate_media(media="print")
    assert page.is_hidden(".bar")
    assert page.is_visible(".card .now .image")
    assert page.pdf()[:5] == b"%PDF-"


def test_a_hundred_probes_of_two_hundred_events_are_thinned_and_say_so(tmp_path):
    file = write_page(large_run(tmp_path, 100, 200, side=64))
    assert file.stat().st_size <= 15_000_000
    text, data = text_and_data(file)
    assert 20 < len(data["steps"]) < 200
    assert {100, 10_100, 20_000} <= set(data["steps"])  # the first, the one with news, the last
    assert f"The slider stops at {len(data['steps'])} of 200 events" in text


@pytest.mark.usefixtures("eager")
def test_a_real_run_leaves_a_page_of_itself(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, controls=images, stop={"enabled": False})
    loop.run(watch, 4, each=lambda loop: loop.accelerator.log({"val_loss": 0.5 / loop.step}, step=loop.step))
    file = tmp_path / "memwatch" / "report.html"
    assert not file.exists()
    watch.close()
    text, data = text_and_data(file)
    assert (data["steps"], data["side"], len(data["probes"])) == ([0, 2, 4], 16, 2)
    assert all(index >= 0 for probe in data["probes"] for index in probe["images"])
    assert "Validation loss" in text
