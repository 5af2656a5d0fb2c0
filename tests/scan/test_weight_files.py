"""Weights as they are found: every format, wrapper and scale is read right, or named before anything is compared."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import trainers as by
from support.families import network
from support.originals import original_weights

from memwatch.denoiser.schedule import NoiseSchedule
from memwatch.scan.checkpoints import load_model, read_weights, text_encoders
from memwatch.scan.prediction import check_prediction
from memwatch.scan.weight_files import CheckpointError, names_in, plain, tensors_in


def moved(module, seed: int = 0):
    """Other weights."""
    other, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other.eval()


def same(model, expected) -> bool:
    return all(torch.equal(a, b.float()) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.fixture(scope="module")
def unet(families):
    """The tiny SD 1 network with other weights; tests must not change it."""
    return moved(network(families["sd1"]))


@pytest.fixture
def base(family_folders):
    return family_folders["sd1"]


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt", ".old.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_tensors_are_read_whatever_their_format(suffix, nested, unet, base, tmp_path):
    file, weights = tmp_path / f"model{suffix}", original_weights(unet)
    if suffix == ".safetensors":
        save_file(weights, file)
    else:
        state = {"state_dict": weights, "global_step": 3} if nested else weights
        torch.save(state, file, _use_new_zipfile_serialization=not suffix.startswith(".old"))
    assert same(load_model(str(file), base), unet)


def test_a_lora_that_is_pickled(families, base, tmp_path):
    model = by.with_lora(copy.deepcopy(network(families["sd1"])), ["to_q"]).eval()
    weights = by.kohya(by.factors_of(model), "lora_unet_")
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save(weights, tmp_path / "folder" / "pytorch_lora_weights.bin")
    assert same(*(load_model(str(tmp_path / name), base) for name in ("a.safetensors", "folder")))


@pytest.mark.parametrize("layout", ["variant", "sharded variant", "bin", "sharded"])
def test_folders_of_every_layout_of_diffusers(layout, unet, base, tmp_path):
    model, folder = copy.deepcopy(unet), tmp_path / "unet"
    options = {
        "variant": {"variant": "fp16"},
        "sharded variant": {"variant": "fp16", "max_shard_size": "20KB"},
        "bin": {"safe_serialization": False},
        "sharded": {"max_shard_size": "20KB"},
    }[layout]
    model.save_pretrained(folder, **options)
    assert same(load_model(str(tmp_path), base), model)
    if "sharded" in layout:
        next(folder.glob("*00002-of*")).unlink()
        with pytest.raises(CheckpointError, match="00002-of"):
            load_model(str(tmp_path), base)


def test_a_pipeline_of_which_only_a_variant_was_saved(families, tmp_path):
    from memwatch.denoiser import Components, load_components

    families["sd1"].save_pretrained(tmp_path / "pipe", variant="fp16")
    names, nothing = ("text_encoder",), Components(None)
    parts = load_components(tmp_path / "pipe", nothing, needs_vae=True, text_encoders=names, device=torch.device("cpu"))
    assert same(parts.vae, families["sd1"].vae)
    assert same(load_model(str(tmp_path / "pipe")), network(families["sd1"]))


class Anything:
    """What a pickle may hold beside tensors."""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"", "is empty"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        ("a.gguf", b"GGUF\x03\0\0\0", "is a GGUF file, whose weights are quantized"),
        ("a.safetensors", b"\x10\0\0\0", "cannot be read"),
        ("a.ckpt", b"not a pickle", "is a pickle that holds more than tensors|cannot be read"),
        ("a.ckpt", {"weight": torch.zeros(1), "hyper": Anything()}, "is a pickle that holds more than tensors"),
        ("a.pt", [torch.zeros(1)], "it holds no named tensors"),
        ("learned_embeds.bin", {"<cat>": torch.zeros(4)}, "holds embeddings of new words"),
        ("cat.pt", {"emb_params": torch.zeros(1, 4)}, "holds embeddings of new words"),
        ("a.pt", {"x.weight": torch.zeros(4), "x.weight.absmax": torch.zeros(1)}, r"quantized \(x.weight.absmax\)"),
        ("a.pt", {"x.weight_scale": torch.zeros(1)}, "x.weight is missing, although its scale is there"),
        ("a.pt", {"module.x": torch.zeros(4), "_orig_mod.x": torch.zeros(1)}, "two tensors are called x"),
    ],
)
def test_a_format_that_is_not_read_is_named_first(name, content, said, base, tmp_path):
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"{name}: .*({said})"):
        load_model(str(file), base)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/__0_0.distcp", "zero_to_fp32.py"])
def test_a_checkpoint_spread_over_processes_is_refused(name, base, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="spread over processes .* merge it first"):
        load_model(str(tmp_path), base)


# --- names and scales -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.base_model.model."])
def test_what_wraps_a_model_leaves_the_names(prefix, unet, base, families, tmp_path):
    save_file({prefix + name: tensor.clone() for name, tensor in unet.state_dict().items()}, tmp_path / "a.safetensors")
    assert same(load_model(str(tmp_path / "a.safetensors"), base), unet)
    lora = by.with_lora(copy.deepcopy(network(families["sd1"])), ["to_q"]).eval()
    plain_names = by.dotted(by.factors_of(lora), "")
    for file, start in (("b.safetensors", "unet."), ("c.safetensors", prefix)):
        save_file({start + name: tensor for name, tensor in plain_names.items()}, tmp_path / file)
    assert same(*(load_model(str(tmp_path / file), base) for file in ("b.safetensors", "c.safetensors")))


def test_a_compiled_block_and_kohyas_compiled_network():
    assert plain("down_blocks.0._orig_mod.resnets.0.conv1.weight") == "down_blocks.0.resnets.0.conv1.weight"
    assert plain("lora_unet__orig_mod_mid_block_proj.lora_up.weight") == "lora_unet_mid_block_proj.lora_up.weight"


@pytest.mark.parametrize("scale", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_of_fp8_are_applied(scale, per_row, unet, base, tmp_path):
    weights, expected = original_weights(unet), copy.deepcopy(unet)
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    name, inside = f"{layer}.weight", expected.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    size = weights[name].abs().amax(1 if per_row else None) / 448
    scaled = (weights[name] / (size[:, None] if per_row else size)).to(torch.float8_e4m3fn)
    about = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), f"{layer}.scale_input": torch.ones(())}
    save_file(weights | about | {name: scaled, layer + scale: size}, tmp_path / "a.safetensors")
    with torch.no_grad():
        inside.weight.copy_(scaled.float() * (size[:, None] if per_row else size))
    assert same(load_model(str(tmp_path / "a.safetensors"), base), expected)
    save_file(weights | {name: scaled, layer + scale: torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"to_q.weight: float8_e4m3fn .* scales \(3,\) is a format"):
        load_model(str(tmp_path / "b.safetensors"), base)


def test_fp8_without_scales_is_what_it_says(unet, base, tmp_path):
    weights, expected = original_weights(unet), copy.deepcopy(unet)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    eighth = weights[name].to(torch.float8_e4m3fn)
    save_file(weights | {name: eighth}, tmp_path / "a.safetensors")
    with torch.no_grad():
        expected.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.copy_(eighth.float())
    assert same(load_model(str(tmp_path / "a.safetensors"), base), expected)


def test_a_folder_that_describes_another_kind_of_model(families, tmp_path):
    families["sd1"].text_encoder.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"its config.json describes nothing, and no model of diffusers"):
        load_model(str(tmp_path))


def test_names_that_fit_in_part_are_counted(unet, base, tmp_path):
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    total = len(weights)
    save_file(weights | {"other.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"{total} of its {total + 1} tensors are the .*, 1 are not, other"):
        load_model(str(tmp_path / "a.safetensors"), base)
    save_file(original_weights(unet) | {"model.diffusion_model.extra": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="the network in it has .* of which the UNet2DConditionModel .* takes"):
        load_model(str(tmp_path / "b.safetensors"), base)
    unet.save_pretrained(tmp_path / "c")
    file = tmp_path / "c" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"x.scale_weight": torch.zeros(())}, file)
    with pytest.raises(
        CheckpointError, match=rf"{total} of the {total} tensors of .* there, 1 others as well .x.scale_weight"
    ):
        load_model(str(tmp_path / "c"), base)


# --- folders of accelerate --------------------------------------------------------------------------------------------


def test_the_trained_part_may_lie_in_any_file(unet, families, base, tmp_path, caplog):
    encoder = moved(families["sd1"].text_encoder, 3)
    for suffix in ("safetensors", "bin"):
        folder = tmp_path / suffix
        folder.mkdir()
        for stem, model in {"model": encoder, "model_1": unet}.items():
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            name = f"{'pytorch_' if suffix == 'bin' else ''}{stem}.{suffix}"
            torch.save(state, folder / name) if suffix == "bin" else save_file(state, folder / name)
        with caplog.at_level(logging.INFO, "memwatch"):
            assert same(load_model(str(folder), base), unet)
            (folder / "optimizer.bin").touch()
        other = f"{'pytorch_' if suffix == 'bin' else ''}model.{suffix}"
        assert f"not read: {other}" in caplog.text
        assert text_encoders(str(folder)) == ["text_encoder"]
        read = read_weights(str(folder), families["sd1"].text_encoder, "text_encoder")
        assert all(torch.equal(read[name], tensor) for name, tensor in encoder.named_parameters())


def test_an_average_beside_the_network_is_named(unet, base, tmp_path, caplog):
    for name in ("unet", "unet_ema"):
        copy.deepcopy(unet).save_pretrained(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "memwatch"):
        load_model(str(tmp_path))
        assert same(read_weights_of(tmp_path, unet), unet)
    assert "not read: model.safetensors, unet_ema" in caplog.text


def read_weights_of(source, like):
    """A network with the weights of a source."""
    model = moved(like, 5)
    model.load_state_dict(read_weights(str(source), like))
    return model


def test_shards_with_an_index(unet, base, tmp_path):
    names = sorted(unet.state_dict())
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, some in shards.items():
        save_file({name: unet.state_dict()[name].clone() for name in some}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, some in shards.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert same(load_model(str(tmp_path), base), unet)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing, 1 of 2 shards"):
        load_model(str(tmp_path), base)


def test_a_wrapped_network_is_refused_because_its_alpha_is_not_there(families, base, tmp_path):
    """Read with alpha = rank it would be another LoRA, in silence."""
    model = by.with_lora(copy.deepcopy(network(families["sd1"])), ["to_q"], rank=2, alpha=8).eval()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="a network that PEFT has wrapped, without the LoRA's alpha; save"):
            load_model(str(source), base)


def test_whole_numbers_without_a_scale_are_no_weights(unet, base, tmp_path):
    weights = original_weights(unet)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    save_file(weights | {name: (weights[name] * 100).to(torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="to_q.weight is quantized to torch.int8, and no scale lies beside it"):
        load_model(str(tmp_path / "a.safetensors"), base)
    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"conv_in.weight": (state["conv_in.weight"] * 100).to(torch.int8)}, file)
    with pytest.raises(CheckpointError, match=r"its weights are quantized \(conv_in.weight\)"):
        load_model(str(tmp_path), base)


# --- what a checkpoint says -------------------------------------------------------------------------------------------

ALPHAS = torch.linspace(0.99, 0.07, 1000, dtype=torch.float64)


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"v_pred": torch.zeros(0)}, {}, r"says v_prediction \(v_pred\), and the scheduler of BASE epsilon"),
        ({"ztsnr": torch.zeros(0)}, {}, r"says zero terminal SNR \(ztsnr\), .* BASE no zero terminal SNR"),
        ({}, {"modelspec.prediction_type": "V"}, r"says v_prediction \(modelspec"),
        ({}, {"ss_v_parameterization": "True"}, r"says v_prediction \(ss_v"),
        ({}, {"ss_zero_terminal_snr": "True"}, r"says zero terminal SNR \(ss_zero"),
        ({}, {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, None),
    ],
)
@pytest.mark.parametrize("layer", ["lora_unet_x.lora_up.weight", "model.diffusion_model.x"])
def test_another_prediction_type_is_an_error_that_names_both(layer, tensors, metadata, said, tmp_path):
    save_file({layer: torch.zeros(1), **tensors}, tmp_path / "a.safetensors", metadata)
    arguments = str(tmp_path / "a.safetensors"), NoiseSchedule(ALPHAS, 1000, "epsilon"), "BASE"
    if said is None:
        check_prediction(*arguments)
        with pytest.raises(CheckpointError, match="says epsilon .*, and the scheduler of BASE v_prediction"):
            check_prediction(arguments[0], NoiseSchedule(ALPHAS, 1000, "v_prediction"), "BASE")
    else:
        with pytest.raises(CheckpointError, match=said):
            check_prediction(*arguments)
    check_prediction(arguments[0], NoiseSchedule(None, 1000, "flow"), "BASE")


def test_the_scheduler_of_a_pipeline_says_it_too(base, tmp_path):
    pipe = shutil.copytree(base, tmp_path / "pipe")
    file = pipe / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"pipe: says v_prediction \(prediction_type\), .* BASE epsilon"):
        check_prediction(str(pipe), NoiseSchedule(ALPHAS, 1000, "epsilon"), "BASE")


# --- at random --------------------------------------------------------------------------------------------------------


def test_any_wrappers_in_any_order_are_read_alike(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    known = {f"block.{i}.weight": torch.full((2,), float(i)) for i in range(4)}
    wrappers = st.lists(st.sampled_from(["_orig_mod.", "module.", "base_model.model."]), max_size=4).map("".join)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @hypothesis.given(prefix=wrappers, inner=st.booleans(), some=st.sets(st.sampled_from(sorted(known)), min_size=1))
    def check(prefix, inner, some):
        names = {name: prefix + (name.replace("block.", "block._orig_mod.") if inner else name) for name in some}
        save_file({names[name]: known[name] for name in some}, tmp_path / "a.safetensors")
        assert {*names_in(tmp_path / "a.safetensors")} == some
        found = tensors_in(tmp_path / "a.safetensors", lambda name: True)
        assert all(torch.equal(found[name], known[name]) for name in some)

    check()
