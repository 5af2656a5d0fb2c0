"""Probes: whatever the user has becomes a list of them, with unique names; each is encoded once."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from support.builders import Loop, assert_same, picture
from support.families import adapted

from memwatch import Probe, ProbeError
from memwatch.config_file import load_config
from memwatch.measure.images import encode_images
from memwatch.measure.prepare import prepare
from memwatch.measure.probes import all_probes, as_probes


def summary(probes: list[Probe]) -> list[tuple]:
    return [(p.name, p.prompt, p.is_reference, p.seed) for p in probes]


def test_prompts_and_probes():
    given = ["a poster", Probe("a cat", picture(0), seed=9), Probe("a dog", seed=2, name="rex")]
    expected = [("a-poster", "a poster", False, 5), ("a-cat", "a cat", True, 9), ("rex", "a dog", False, 2)]
    assert summary(as_probes(given, seed=5)) == expected
    assert as_probes(given[2]) == [given[2]]


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    found = as_probes(str(tmp_path / "prompts.txt"), seed=3)
    assert summary(found) == [("a-cat", "a cat", False, 3), ("a-dog", "a dog", False, 3)]


def test_prompts_of_kohyas_form_and_what_of_them_does_not_count(tmp_path, caplog):
    text = "# note\na cat --n low quality --w 512\none\u2028line\u0085 here --D 7 --s 20\na dog --seed 8 --d -1\r\n"
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with caplog.at_level(logging.WARNING, "memwatch"):
        found = as_probes(tmp_path / "prompts.txt", seed=3)
    assert [(p.prompt, p.seed) for p in found] == [
        ("a cat", 3),
        ("one\u2028line\u0085 here", 7),
        ("a dog", 8),
    ]
    comments, unused = caplog.messages
    assert "1 line of" in comments
    assert "memwatch does not use the options --d, --n, --s, --w in" in unused


def test_a_folder_with_captions_beside_the_images(tmp_path):
    for name in ("b.png", "a.JPG"):
        picture(0).save(tmp_path / name)
    (tmp_path / "b.txt").write_text(" the letter b\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not an image", encoding="utf-8")
    found = as_probes(tmp_path)
    assert summary(found) == [("a", "", True, 0), ("b", "the letter b", True, 0)]
    assert [p.image for p in found] == [tmp_path / "a.JPG", tmp_path / "b.png"]


def test_a_folder_with_metadata(tmp_path):
    rows = [{"file_name": "x/1.png", "text": "one"}, {"file_name": "2.png", "caption": "two"}, {"file_name": "3.png"}]
    text = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    found = as_probes(tmp_path)
    assert summary(found) == [("1", "one", True, 0), ("2", "", True, 0), ("3", "", True, 0)]  # one column for all
    assert found[0].image == tmp_path / "x" / "1.png"


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_rows_of_a_dataset(key):
    image = picture(0)
    found = as_probes([{key: "a cat", "image": image}, {key: "a dog", "seed": 4, "name": "rex"}], seed=1)
    assert summary(found) == [("a-cat", "a cat", True, 1), ("rex", "a dog", False, 4)]
    assert found[0].image is image


def test_rows_have_captions_as_data_sets_have_them(caplog):
    texts = [["a cat", "one cat"], np.array(["a dog"]), None, float("nan")]
    with caplog.at_level(logging.WARNING, "memwatch"):
        found = as_probes([{"img": picture(0), "en_text": text} for text in texts])
    assert [p.prompt for p in found] == ["a cat", "a dog", "", ""]
    assert caplog.messages == ["probes: 2 of 4 images have no caption; memwatch looks at them under the empty caption"]


def test_names_are_unique_and_safe_for_files():
    found = as_probes(["a/../b", "a/../b", Probe("x", name="a/../b"), "語", "!!!", "..", "w" * 99])
    assert [p.name for p in found] == ["a-..-b", "a-..-b-2", "a-..-b-3", "語", "probe", "probe-2", "w" * 60]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a cat", 3], "item 1 is a int; expected a prompt, a Probe or a row with 'image' and 'text'"),
        (["a cat", " "], "prompt 1 is empty"),
        ([{"image": None}], "item 0 is a dict"),
        ([], "holds no image and no prompt"),
        ("no/such/place", "'no/such/place' is neither a folder nor a file"),
        (8, "got 8, allowed: an image folder, a text file of prompts, a list of prompts and Probes, or rows"),
        ({"text": "a cat"}, "got {'text': 'a cat'}, allowed"),
        (b"a cat", "got b'a cat', allowed"),
        (picture(0), "got <PIL.Image.Image .*>, allowed"),
        (np.zeros((2, 2)), "item 0 is a ndarray"),
        ([{"image": None, "text": "a cat"}], "item 0 is a dict"),
        ([{"file_name": "a.png", "text": "a cat"}], "item 0 is a dict"),
    ],
)
def test_what_is_no_probe_is_named(source, message):
    with pytest.raises(ProbeError, match=f"probes: .*{message}"):
        as_probes(source)


def test_the_argument_is_named(pretrained, pipeline, tmp_path):
    picture(0).save(tmp_path / "cat.png")
    with pytest.raises(
        ProbeError, match=r"probes: '.*cat.png' is no text file with one prompt .*; allowed: an image folder"
    ):
        as_probes(tmp_path / "cat.png")
    loop = Loop(pretrained, tmp_path)
    for key in ("probes", "controls"):
        with pytest.raises(ProbeError, match=f"{key}: got 8, allowed: an image folder"):
            loop.watch(pipeline, **{key: 8})


def test_watched_probes_and_controls_are_named_apart():
    given = [Probe("a cat", picture(0), name="cat", is_control=True), Probe("a poster", seed=3, name="poster")]
    found = all_probes(load_config(None, controls=["a dog"], seed=5), given)
    assert [p.name for p in found] == ["cat", "poster", "control/a-dog"]
    assert [p.is_control for p in found] == [False, False, True]
    assert [p.seed for p in found] == [0, 3, 5]


@pytest.mark.parametrize("line", ['{"text": "no file"}', "not json", "[1]"])
def test_broken_metadata_names_its_line(line, tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n' + line, encoding="utf-8")
    with pytest.raises(ProbeError, match=r"probes: .*metadata\.jsonl, line 2: expected "):
        as_probes(tmp_path)


@pytest.mark.parametrize(
    ("probe", "title"),
    [
        (Probe("a red bus", "train/bus.png", name="bus"), "a red bus (bus.png)"),
        (Probe("a red bus", Image.new("RGB", (8, 8)), name="row-00105", row=105), "a red bus (row 105)"),
        (Probe("a  red\nbus"), "a red bus"),
        (Probe("", "train/bus.png"), "bus.png"),
        (Probe("", Image.new("RGB", (8, 8)), name="class-3"), "class-3"),
        (Probe("a photo of a very long red bus in the rain of April"), "a photo of a very long red bus in the r…"),
    ],
)
def test_a_title_is_caption_and_file_name(probe, title):
    assert probe.title == title


def test_probes_of_both_kinds_are_encoded_once(pipeline):
    denoiser, parts = adapted(pipeline)
    probes = [Probe("a photo of a cat", picture(0), name="cat"), Probe("a red poster", name="poster")]
    cat, poster = prepare(probes, denoiser, parts, 16)
    assert np.array_equal(cat.image, np.asarray(picture(0)))
    assert_same(cat.latents, encode_images([cat.image], pipeline.vae)[0])
    assert (poster.image, poster.latents) == (None, None)
    for prepared in (cat, poster):
        assert_same(dict(prepared.conditioning), dict(denoiser.encode(prepared.probe.prompt, parts, 16)))


def test_latents_that_are_not_finite_are_refused(pipeline):
    denoiser, parts = adapted(pipeline)
    parts.vae = copy.deepcopy(pipeline.vae)
    with torch.no_grad():
        parts.vae.quant_conv.weight.fill_(torch.nan)
    with pytest.raises(ProbeError, match=r"probe 'cat': the VAE gives latents that are not finite; pass it in float32"):
        prepare([Probe("a cat", picture(0), name="cat")], denoiser, parts, 16)


def test_what_is_resized_is_said_in_one_line_by_one_process(families, caplog):
    denoiser, parts = adapted(families["sd1"])
    sizes = {"cat": (32, 16), "dog": (16, 16), "cow": (40, 40)}
    probes = [Probe("a photo", picture(0).resize(size), name=name) for name, size in sizes.items()]
    probes += [Probe("a prompt", name="poster"), Probe("a photo of a cat " * 20, picture(0), name="long")]
    with caplog.at_level(logging.WARNING, "memwatch"):
        prepare(probes, denoiser, parts, 16, says=False)
        assert caplog.messages == []
        prepare(probes, denoiser, parts, 16)
    cut, resized = caplog.messages
    assert "is longer than" in cut
    assert resized == "2 of 4 images are resized and cropped to 16 px, first that of 'cat', 32x16 px"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("prompts.toml", "", "toml' is no text file with one prompt per line"),
        ("metadata.jsonl", "", "jsonl' is no text file with one prompt per line"),
        ("prompts.csv", "", "csv' is no text file with one prompt per line"),
        ("p.txt", '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a cat"\n', "p.txt' holds TOML or JSON"),
        ("p.txt", '["a cat",\n"a dog"]', "p.txt' holds TOML or JSON"),
        ("p.txt", 'a cat\n--prompt "a dog" --seed 1\n', "p.txt, line 2: expected a prompt before its options"),
        ("p.txt", "a cat".encode("cp1252") + b"\n\xe9", "p.txt, line 2: byte 0xe9 is no utf-8"),
    ],
)
def test_files_that_hold_no_prompts_by_line_are_refused_by_name(name, text, said, tmp_path):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ProbeError, match=f"probes: .*{said}"):
        as_probes(tmp_path / name)


def test_tables_and_data_sets_are_read_before_their_transforms():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    with pytest.raises(ProbeError, match="probes: got "):
        as_probes(pandas.DataFrame({"image": [1], "text": ["a cat"]}))
    rows = datasets.Dataset.from_dict({"image": [picture(0)], "text": ["a cat"]}).cast_column("image", datasets.Image())
    found = as_probes(rows.with_transform(lambda batch: {"pixel_values": [0]}))
    assert [p.prompt for p in found] == ["a cat"]
