"""The report page in headless Chromium: everything moves together, nothing leaves the file, sizes hold."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from support.browser import contrast, needs_chromium, opened
from support.builders import EAGER, Loop
from support.runs import large_run, memorized, save_image, save_map, write_run

from memwatch.report.page import write_page

NAMES = ("cat", "poster", "tree")
STEPS = (100, 200, 300)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three probes, three events: ``cat`` is stored, ``poster`` (a prompt) is suspicious, ``tree`` is neither."""
    folder = tmp_path_factory.mktemp("small") / "memwatch"
    probes = [
        {"name": "cat"},
        {"name": "poster", "is_reference": False, "prompt": "a <b>red</b> poster"},
        {"name": "tree"},
    ]
    proof = {"generations": 2, "copies": 1, "ratios": [0.2, 0.9], "is_copy": [True, False], "of_others": {"tree": 1}}
    told = {"alert": True, "alert_text": "memwatch, step 200: cat is memorized.\nregion (16, 8, 48, 40) px"}
    suspicious = {
        "verdict": "suspicious",
        "severity": 1.4,
        "p": 0.004,
        "alert": True,
        "reason": "evidence at 1 of 2 events in a row",
    }
    suspicious["alert_text"] = "memwatch, step 200: poster is suspicious."
    events = [
        {"step": 100},
        {"step": 200, "rows": {"cat": memorized(2.0, 100, copied=proof, **told), "poster": suspicious}},
        {"step": 300, "rows": {"cat": memorized(2.4, 100)}, "stop_reason": "step 300: 1 probe(s) memorized: cat"},
    ]
    write_run(folder, probes, events, training_rows=97, machine="x86_64", versions={"torch": "2.13.0"})
    for i, step in enumerate(STEPS):
        found = np.zeros((8, 8))
        found[: 4 + i, :4] = 0.3 * i
        save_map(folder, step, {"cat": found, "poster": found / 2, "tree": np.zeros((8, 8))})
        save_image(folder, "images", "poster", f"step_{step:07d}.jpg", seed=step)
    save_image(folder, "images", "cat.png", seed=1)
    save_image(folder, "images", "tree.png", seed=2)
    save_image(folder, "generations", "cat", "step_0000200.jpg", count=2, seed=3)
    rows = [{"step": step, "key": "val_loss", "value": 0.3 - step / 1e4} for step in STEPS]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_page(folder)
    return folder


@pytest.fixture
def page(small):
    with opened(small / "report.html") as page:
        yield page
        assert page.problems == []


def sources(page, layer: str = ".now .map") -> list:
    """What the cards show, in the gallery's order: cat, tree, poster."""
    return page.eval_on_selector_all(f".card {layer}", "nodes => nodes.map(node => node.getAttribute('src'))")


def until(page, css: str, text: str) -> None:
    """Wait for a text. ``page.wait_for_function`` would need what the page's security policy forbids."""
    from playwright.sync_api import expect

    expect(page.locator(css)).to_have_text(text)


def decoded(uri: str) -> np.ndarray:
    """Palette indices or RGB of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@needs_chromium
def test_one_slider_moves_every_picture_number_and_verdict(page):
    assert page.text_content("#step") == "300"
    assert page.eval_on_selector_all(".card h3 a", "nodes => nodes.map(node => node.textContent)") == [
        "a photo of cat (cat)",
        "a <b>red</b> poster (poster)",
        "a photo of tree (tree)",
    ]
    seen = {}
    for i, step in enumerate(STEPS):
        page.fill("#slider", str(i))
        maps = sources(page)
        seen[step] = maps
        assert page.text_content("#step") == str(step)
        assert (decoded(maps[0]) > 0).sum() == 4 * (4 + i) if i else maps[0] is None
        assert maps[2] is None  # nothing on the tree
    assert len({uris[0] for uris in seen.values()}) == len({uris[1] for uris in seen.values()}) == 3
    page.fill("#slider", "1")
    assert page.eval_on_selector_all(".card .chip", "n => n.map(x => x.textContent)") == [
        "memorized",
        "suspicious",
        "no evidence",
    ]
    assert page.text_content(".card .effect") == "2.0x less freedom, p = 1e-09"
    reasons = ["evidence since step 100", "evidence at 1 of 2 events in a row", "the controls show as much"]
    assert page.locator(".card .why").all_text_contents() == reasons
    page.fill("#slider", "0")
    assert page.eval_on_selector_all(".card .chip", "n => n.map(x => x.textContent)") == ["no evidence"] * 3
    assert page.eval_on_selector_all(".card .boxes rect", "n => n.length") == 0


@needs_chromium
def test_what_a_prompt_generates_changes_and_a_training_image_is_there_once(page, small):
    images = []
    for i in range(3):
        page.fill("#slider", str(i))
        images.append(sources(page, ".now .image"))
    assert len({shown[0] for shown in images}) == 1
    assert len({shown[1] for shown in images}) == 3
    text = (small / "report.html").read_text(encoding="utf-8")
    assert text.count(images[0][0]) == 1


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
    assert page.locator(".card:visible h3 a").all_text_contents() == [
        "a photo of cat (cat)",
        "a <b>red</b> poster (poster)",
    ]
    page.uncheck("#filter input[value=memorized]")
    page.uncheck("#filter input[value=suspicious]")
    assert page.is_visible("#none")
    page.fill("#slider", "0")  # the filter follows the step
    page.check("#filter input[value=no-evidence]")
    assert page.locator(".card:visible").count() == 3


@needs_chromium
def test_a_line_lights_its_picture_and_a_click_goes_to_its_step(page):
    line = page.locator(".chart .line[data-probe='0']").first
    line.dispatch_event("mouseenter")
    assert page.locator(".card.lit h3 a").all_text_contents() == ["a photo of cat (cat)"]
    line.dispatch_event("mouseleave")
    assert page.locator(".card.lit").count() == 0
    line.focus()
    assert page.locator(".card.lit h3 a").all_text_contents() == ["a photo of cat (cat)"]
    box = page.locator(".chart").first.bounding_box()
    page.mouse.click(box["x"] + 0.05 * box["width"], box["y"] + 0.5 * box["height"])
    assert page.text_content("#step") == "100"


@needs_chromium
def test_the_charts_show_every_event_and_their_cursors_are_at_the_same_step(page):
    severities, losses = page.locator(".chart").all()
    names = severities.locator(".line[data-probe] title").all_text_contents()
    assert names[-1] == "a photo of cat (cat)"  # the worst on top
    points = "nodes => nodes.map(node => node.getAttribute('points').split(' ').length)"
    assert severities.locator(".line[data-probe] polyline").evaluate_all(points) == [3, 3, 3]
    assert losses.locator(".line title").all_text_contents() == ["val_loss"]
    assert severities.locator(".mark title").all_text_contents() == [
        "step 200: a photo of cat (cat) is memorized",
        "step 200: 1 of 2 generations copy a photo of cat (cat)",
        "step 200: a <b>red</b> poster (poster) is suspicious",
    ]
    said = severities.locator("text").all_text_contents()
    assert {"1x", "1.5x", "2x", "alert level 1.5x", "stop, step 300", "100", "300"} <= set(said)
    assert severities.locator("polygon.band").count() == 1
    for i, step in enumerate(STEPS):
        page.fill("#slider", str(i))
        at = page.eval_on_selector_all(".chart .cursor", "n => n.map(x => parseFloat(x.getAttribute('d').slice(1)))")
        widths = (740, 460)
        assert at == [pytest.approx(46 + (w - 150 - 46) * (step - 100) / 200, abs=0.06) for w in widths]


@needs_chromium
def test_generations_that_copy_are_framed(page):
    shown = page.locator(".generations img")
    assert shown.evaluate_all("n => n.map(x => [x.className, x.complete && x.naturalWidth])") == [
        ["copy", 64],
        ["", 64],
    ]
    assert "1 of 2 generations copies it; copies of other images: tree (1)" in page.text_content(".generations")


@needs_chromium
def test_the_page_answers_the_five_questions(page):
    top = page.text_content(".top")
    assert "1 of 3 probes is memorized, since step 100; memwatch decided to stop the training at step 300." in top
    assert "a photo of cat (cat) is strongest. 2.4x less freedom, p = 1e-09: evidence since step 100" in " ".join(
        top.split()
    )
    assert "Find its duplicates" in top
    assert "The training set has 97 rows; 2 of them are watched." in page.text_content("body")
    assert "0 of 20 controls called; at most 14 %" in page.text_content("body")
    assert "min_severity: 1.5" in page.text_content("pre")
    assert "torch 2.13.0" in page.text_content("body")
    assert "region (16, 8, 48, 40) px" in page.text_content("#probe-0 .alert-text")


@needs_chromium
def test_what_a_run_says_is_text_and_never_markup(page):
    assert page.locator("b", has_text="red").count() == 0
    assert "a <b>red</b> poster" in page.text_content("#probe-2") + page.text_content("#probe-1")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(scheme, small):
    with opened(small / "report.html", color_scheme=scheme) as page:
        style = page.evaluate(
            "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
        )
        assert contrast(*style) > 7
        soft = page.evaluate("getComputedStyle(document.querySelector('.legend')).color")
        assert contrast(soft, style[1]) > 4.5
        for chip in page.eval_on_selector_all(
            ".chip", "n => n.map(x => [getComputedStyle(x).color, getComputedStyle(x).backgroundColor])"
        ):
            assert contrast(*chip) > 4.5
        assert page.problems == []


@needs_chromium
def test_it_prints_without_its_controls_and_with_its_pictures(page):
    page.emulate_media(media="print")
    assert page.is_hidden(".bar")
    assert page.is_visible(".card .now .image")
    assert page.pdf()[:5] == b"%PDF-"


@needs_chromium
def test_on_a_narrow_screen_nothing_sticks_out(small):
    with opened(small / "report.html") as page:
        page.set_viewport_size({"width": 380, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 380


@needs_chromium
def test_sixteen_probes_of_fifty_events_are_small_and_open_within_a_second(tmp_path):
    file = write_page(large_run(tmp_path, 16, 50))
    assert file.stat().st_size <= 3_000_000
    with opened(file) as page:
        assert page.text_content("#step") == "5000"
        assert page.get_attribute("#slider", "max") == "49"
        assert "stops at" not in page.text_content("body")
        assert page.problems == []


def test_a_hundred_probes_of_two_hundred_events_are_thinned_and_say_so(tmp_path):
    file = write_page(large_run(tmp_path, 100, 200, side=64))
    assert file.stat().st_size <= 15_000_000
    text = file.read_text(encoding="utf-8")
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert 20 < len(data["steps"]) < 200
    assert {100, 10_100, 20_000} <= set(data["steps"])  # the first, the one with news, the last
    assert f"The slider stops at {len(data['steps'])} of 200 events" in text


@pytest.mark.usefixtures("eager")
def test_a_real_run_leaves_a_page_of_itself(pretrained, pipeline, images, tmp_path):
    loop = Loop(pretrained, tmp_path)
    watch = loop.watch(pipeline, controls=images, **EAGER | {"stop": {"enabled": False}})
    loop.run(
        watch, 4, each=lambda running: running.accelerator.log({"val_loss": 0.5 / running.step}, step=running.step)
    )
    assert not (tmp_path / "memwatch" / "report.html").exists()
    watch.close()
    text = (tmp_path / "memwatch" / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["steps"] == [0, 2, 4]
    assert data["side"] == 16
    assert len(data["probes"]) == 2
    assert all(index >= 0 for probe in data["probes"] for index in probe["images"])
    assert "Validation loss" in text
    assert f"The training set has {len(loop.loader.dataset)} rows; 1 of them are watched." in text
