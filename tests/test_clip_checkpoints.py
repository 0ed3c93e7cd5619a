"""Checkpoints in every form that CLIPs are published in, and files that look like them and are not."""

from __future__ import annotations

import ast
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_references import (
    Reference,
    folder_of,
    little_memory_and_time,
    openai_outline,
    our_image_features,
    our_numpy_text_features,
    our_text_features,
    random_weights,
    small_config,
    transformers_form,
    transformers_model,
    transformers_outline,
    write_openai_archive,
    write_safetensors_header,
)
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from searchengine.errors import ModelNotFound, WeightsError
from searchengine.models.clip.architecture import (
    VIT_B_16,
    VIT_B_32,
    VIT_L_14,
    VIT_L_14_336,
    Activation,
    ClipConfig,
    TransformerConfig,
)
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.configuration import activation_by_name

CONFIG = small_config(image_width=64, image_layers=2, text_layers=1)
TEXTS = [[5, 17, 30, 99], [5, 17, 99], [5, 17, 30, 98]]
PIXELS = torch.randn(2, CONFIG.image_size, CONFIG.image_size, 3, generator=torch.Generator().manual_seed(0))
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(CONFIG)


def contiguous(weights: Weights) -> Weights:
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def save_safetensors(weights: Weights, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(contiguous(weights), path)
    return path


def load_all(path: Path) -> Checkpoint:
    """Everything that is in the file is read."""
    checkpoint = Checkpoint(path)
    checkpoint.image_transformer()
    checkpoint.text_transformer()
    assert math.isfinite(checkpoint.logit_scale)
    return checkpoint


def assert_refused(path: Path, *reasons: str) -> None:
    with little_memory_and_time(), pytest.raises(WeightsError) as caught:
        load_all(path)
    message = str(caught.value)
    assert path.name in message or str(path.parent) in message
    assert "\n" not in message
    for reason in reasons:
        assert reason in message


# --- every form


@dataclass
class Form:
    """A file, what it holds as float32, and the activation with who told it."""

    path: Path
    weights: Weights
    activation: Activation = "quick_gelu"
    source: str = "name"


def as_torch_file(weights: Weights, folder: Path, dtype: torch.dtype, name: str = "vit-openai.pt") -> Form:
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save(cast, folder / name)
    return Form(folder / name, {name: tensor.float() for name, tensor in cast.items()})


def as_openai_archive(weights: Weights, folder: Path) -> Form:
    """Under the name that it has among ours, which tells nothing."""
    kept = write_openai_archive(folder / "clip-vit-b-32.pt", CONFIG, weights)
    return Form(folder / "clip-vit-b-32.pt", {name: tensor.float() for name, tensor in kept.items()}, source="file")


def as_training_checkpoint(weights: Weights, folder: Path) -> Form:
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    momentum = {"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": momentum}, folder / "epoch_3-laion2b.pt")
    return Form(folder / "epoch_3-laion2b.pt", weights, "gelu")


def as_transformers_folder(weights: Weights, folder: Path, activation: Activation = "quick_gelu") -> Form:
    model = transformers_model(replace(CONFIG, activation=activation), weights)
    model.save_pretrained(folder)
    return Form(folder / "model.safetensors", weights, activation, "config")


def as_transformers_torch_file(weights: Weights, folder: Path) -> Form:
    form = as_transformers_folder(weights, folder)
    form.path.unlink()
    torch.save(transformers_form(weights), folder / "pytorch_model.bin")
    return replace(form, path=folder / "pytorch_model.bin")


def open_clip_config(config: ClipConfig, **more: object) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": config.dim,
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.image.layers,
                "width": config.image.width,
                "patch_size": config.patch_size,
            },
            "text_cfg": {
                "context_length": config.context,
                "vocab_size": config.vocabulary,
                "width": config.text.width,
                "heads": config.text.heads,
                "layers": config.text.layers,
            },
            **more,
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }


def as_open_clip_folder(weights: Weights, folder: Path, activation: Activation = "gelu") -> Form:
    content = open_clip_config(CONFIG, **({"quick_gelu": True} if activation == "quick_gelu" else {}))
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return Form(save_safetensors(weights, folder / "open_clip_model.safetensors"), weights, activation, "config")


FORMS: dict[str, Callable[[Weights, Path], Form]] = {
    "OpenAI's archive": as_openai_archive,
    "fp32 state dict": lambda weights, folder: as_torch_file(weights, folder, torch.float32),
    "fp16 state dict": lambda weights, folder: as_torch_file(weights, folder, torch.float16),
    "bf16 state dict": lambda weights, folder: as_torch_file(weights, folder, torch.bfloat16),
    "training checkpoint": as_training_checkpoint,
    "transformers' folder": as_transformers_folder,
    "transformers' folder with gelu": lambda weights, folder: as_transformers_folder(weights, folder, "gelu"),
    "transformers' torch file": as_transformers_torch_file,
    "open_clip's folder": as_open_clip_folder,
    "open_clip's folder with quickgelu": lambda weights, folder: as_open_clip_folder(weights, folder, "quick_gelu"),
}


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_every_form_is_loaded_to_the_features_of_a_reference(
    build: Callable[[Weights, Path], Form], weights: Weights, tmp_path: Path
) -> None:
    form = build(weights, tmp_path)
    checkpoint = load_all(form.path)
    config = replace(CONFIG, activation=form.activation)
    assert checkpoint.config == config
    assert checkpoint.activation_source == form.source
    assert checkpoint.logit_scale == pytest.approx(form.weights["logit_scale"].exp().item())
    reference = Reference("openai" if form.activation == "quick_gelu" else "open_clip", config, form.weights)
    assert torch.allclose(our_image_features(checkpoint, PIXELS), reference.image_features(PIXELS), rtol=0, atol=1e-5)
    for features in (our_text_features(checkpoint, TEXTS), our_numpy_text_features(checkpoint, TEXTS)):
        assert torch.allclose(features, reference.text_features(TEXTS), rtol=0, atol=1e-5)
    for tower in (checkpoint.image_transformer(), checkpoint.text_transformer()):
        assert not tower.training
        for parameter in tower.parameters():
            assert (parameter.dtype, parameter.device.type, parameter.requires_grad) == (torch.float32, "cpu", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    halves = {name: tensor.to(dtype) for name, tensor in weights.items()}
    one = load_all(save_safetensors(halves, tmp_path / "half-openai.safetensors"))
    other = load_all(
        save_safetensors({name: t.float() for name, t in halves.items()}, tmp_path / "full-openai.safetensors")
    )
    for a, b in (
        (one.image_transformer(), other.image_transformer()),
        (one.text_transformer(), other.text_transformer()),
    ):
        for left, right in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(left, right)


# --- the architecture, from names and shapes alone

PUBLISHED = {"ViT-B/32": VIT_B_32, "ViT-B/16": VIT_B_16, "ViT-L/14": VIT_L_14, "ViT-L/14@336px": VIT_L_14_336}


def shapes_of(config: ClipConfig, publisher: str) -> dict[str, tuple[int, ...]]:
    """As the publisher's own program has them."""
    outline = openai_outline(config) if publisher == "openai" else transformers_outline(config)
    return {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}


@pytest.mark.parametrize("publisher", ["openai", "transformers"])
@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_architectures_are_told_by_the_header_alone(
    config: ClipConfig, publisher: str, tmp_path: Path
) -> None:
    path = tmp_path / "vit-quickgelu.safetensors"
    write_safetensors_header(path, shapes_of(config, publisher))
    checkpoint = Checkpoint(path)
    assert checkpoint.config == config
    assert path.stat().st_blocks * 512 < 2**20 < path.stat().st_size


def test_the_number_of_heads_is_taken_from_the_configuration(tmp_path: Path) -> None:
    config = replace(CONFIG, image=TransformerConfig(width=128, layers=1, heads=4))
    write_safetensors_header(tmp_path / "a-openai.safetensors", shapes_of(config, "openai"))
    content = open_clip_config(config)
    content["model_cfg"]["vision_cfg"]["head_width"] = 32
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert Checkpoint(tmp_path / "a-openai.safetensors").config == replace(config, activation="gelu")
    transformers_outline(config).config.save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    assert Checkpoint(tmp_path / "a-openai.safetensors").config == config


# Of open_clip's list: their heads are 80, 88 and 104 wide, which shows in no shape.
@pytest.mark.parametrize("width, heads", [(1280, 16), (1408, 16), (1664, 16)], ids=["ViT-H", "ViT-g", "ViT-bigG"])
def test_a_width_whose_heads_are_not_64_wide_is_refused_unless_they_are_told(
    width: int, heads: int, tmp_path: Path
) -> None:
    config = replace(CONFIG, activation="gelu", image=TransformerConfig(width=width, layers=1, heads=heads))
    path = tmp_path / "a-laion2b.safetensors"
    write_safetensors_header(path, shapes_of(replace(config, activation="quick_gelu"), "openai"))
    assert_refused(path, "heads", "beside")
    content = open_clip_config(config)
    content["model_cfg"]["vision_cfg"]["head_width"] = width // heads
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert Checkpoint(path).config == config


# --- who tells the activation


@pytest.mark.parametrize(
    "name, activation",
    [
        ("ViT-B-32-quickgelu.safetensors", "quick_gelu"),
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "quick_gelu"),
        ("my_quick_gelu.pt", "quick_gelu"),
        ("my-quick-gelu.pt", "quick_gelu"),
        ("my-gelu.pt", "gelu"),
        ("GELU.pt", "gelu"),
        ("ViT-B-32-openai.pt", "quick_gelu"),
        ("CLIP-ViT-B-32-laion2B-s34B-b79K/model.bin", "gelu"),
        ("CLIP-ViT-B-16-DataComp.XL-s13B-b90K/model.bin", "gelu"),
        ("metaclip_400m/model.bin", "quick_gelu"),
        ("vit_huge_patch14_clip_224.metaclip_altogether/model.bin", None),  # unlike all other MetaCLIPs
        ("DFN2B-CLIP-ViT-L-14/model.bin", "quick_gelu"),
        ("DFN2B-CLIP-ViT-L-14-39B/model.bin", None),  # unlike all other DFN-2B
        ("laion2b/ViT-B-32-openai.pt", "quick_gelu"),
        ("openai/ViT-B-32-laion2b.pt", "gelu"),
        ("ViT-B-32-laion2b-openai.pt", None),
        ("model.safetensors", None),
        ("ViT-B-32.pt", None),
        ("vit_b_16-laion400m_e31-00efa78f.pt", None),
        ("angelus/model.safetensors", None),
        ("Angelus.pt", None),
    ],
)
def test_the_activation_is_told_by_the_name_of_a_file_or_folder(
    name: str, activation: Activation | None, weights: Weights, tmp_path: Path
) -> None:
    path = save_safetensors(weights, tmp_path / name)
    if activation is None:
        assert_refused(path, "activation", "quickgelu or gelu", "config.json")
    else:
        checkpoint = Checkpoint(path)
        assert (checkpoint.config.activation, checkpoint.activation_source) == (activation, "name")


def test_what_names_tell_is_what_open_clip_publishes() -> None:
    """Each tag of each vision transformer in open_clip's list that a name settles, settles it rightly."""
    source = (folder_of("open_clip") / "pretrained.py").read_text("utf-8")
    told = 0
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            continue
        target = statement.targets[0]
        if not isinstance(target, ast.Name) or not target.id.startswith("_VIT"):
            continue
        for entry in statement.value.keywords:
            assert isinstance(entry.value, ast.Call)
            settings_given = {word.arg: word.value for word in entry.value.keywords}
            quick = "quick_gelu" in settings_given
            names = [entry.arg or ""]
            for key in ("hf_hub", "url"):
                value = settings_given.get(key)
                if isinstance(value, ast.Constant):
                    names.append(value.value.rstrip("/").rpartition("/")[2])
            for name in names:
                activation = activation_by_name(Path(f"/models/{name}/model.safetensors"))
                assert activation in (None, "quick_gelu" if quick else "gelu"), name
                told += activation is not None
    assert told > 40


@pytest.mark.parametrize("name", ["quickgelu.safetensors", "gelu.safetensors"])
def test_a_configuration_is_believed_before_a_name(name: str, weights: Weights, tmp_path: Path) -> None:
    form = as_open_clip_folder(weights, tmp_path, "gelu")
    form.path.rename(tmp_path / name)
    checkpoint = Checkpoint(tmp_path / name)
    assert (checkpoint.config.activation, checkpoint.activation_source) == ("gelu", "config")


# --- configurations beside it


def test_the_configuration_of_another_model_tells_nothing(weights: Weights, tmp_path: Path) -> None:
    path = save_safetensors(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu"}))
    assert_refused(path, "activation")
    path.rename(tmp_path / "openai.safetensors")
    assert load_all(tmp_path / "openai.safetensors").activation_source == "name"


def test_the_configuration_of_another_clip_is_refused(weights: Weights, tmp_path: Path) -> None:
    """Its two heads divide a width of 64 too, into features that are wrong without a word."""
    path = save_safetensors(weights, tmp_path / "openai.safetensors")
    other = small_config(image_width=128, text_width=128)
    transformers_outline(other).config.save_pretrained(tmp_path)
    assert_refused(path, "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(other)))
    assert_refused(path, "open_clip_config.json")


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.5, 0.5, 0.5]},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
    ],
)
def test_weights_that_want_other_pixels_than_ours_are_refused(
    preprocessing: dict[str, object], weights: Weights, tmp_path: Path
) -> None:
    """open_clip's ViT-L/14 of LAION-2B was trained with another mean, DFN-5B on squashed photos."""
    form = as_open_clip_folder(weights, tmp_path)
    content = open_clip_config(CONFIG)
    content["preprocess_cfg"] |= preprocessing
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert_refused(form.path)


TRANSFORMERS_CONFIG: dict[str, Any] = {
    "model_type": "clip",
    "vision_config": {"hidden_act": "quick_gelu", "hidden_size": 64, "num_attention_heads": 1},
    "text_config": {"hidden_act": "quick_gelu", "hidden_size": 64, "num_attention_heads": 1},
}


def changed(content: dict[str, Any], keys: tuple[str, ...], value: object) -> str:
    """`content` as JSON, with one value in its depth replaced."""
    content = json.loads(json.dumps(content))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return json.dumps(content)


DAMAGED_TRANSFORMERS = [
    (("vision_config",), None),
    (("vision_config",), "large"),
    (("text_config",), []),
    (("vision_config", "hidden_act"), "relu"),
    (("vision_config", "hidden_act"), "gelu"),  # unlike the text side's
    (("vision_config", "hidden_act"), ["gelu"]),
    (("vision_config", "hidden_act"), 7),
    (("vision_config", "layer_norm_eps"), 1e-3),
    (("vision_config", "num_attention_heads"), "1"),
    (("vision_config", "num_attention_heads"), -1),
    (("vision_config", "num_attention_heads"), 0),
    (("vision_config", "num_attention_heads"), 1.0),
    (("vision_config", "num_attention_heads"), 7),
    (("vision_config", "num_attention_heads"), [1]),
    (("vision_config", "num_attention_heads"), True),
    (("text_config", "num_attention_heads"), "1"),
    (("text_config", "num_attention_heads"), -8),
]
DAMAGED_OPEN_CLIP = [
    (("model_cfg",), None),
    (("model_cfg",), []),
    (("model_cfg", "vision_cfg"), 7),
    (("model_cfg", "vision_cfg", "width"), "64"),
    (("model_cfg", "vision_cfg", "width"), 64.0),
    (("model_cfg", "vision_cfg", "head_width"), 0),
    (("model_cfg", "vision_cfg", "head_width"), -64),
    (("model_cfg", "vision_cfg", "head_width"), "64"),
    (("model_cfg", "text_cfg", "heads"), "1"),
    (("model_cfg", "text_cfg", "heads"), -1),
    (("model_cfg", "text_cfg", "heads"), None),
    (("model_cfg", "quick_gelu"), "false"),
]


@pytest.mark.parametrize(
    "name, text",
    [
        *(("config.json", changed(TRANSFORMERS_CONFIG, keys, value)) for keys, value in DAMAGED_TRANSFORMERS),
        *(("open_clip_config.json", changed(open_clip_config(CONFIG), *case)) for case in DAMAGED_OPEN_CLIP),
        *(
            ("config.json", text)
            for text in ("", "{", "[]", "7", "null", '"clip"', "[" * 10**5, '{"a": 1' + "0" * 10**4)
        ),
        *(("open_clip_config.json", text) for text in ("", "{", "[]", "{}")),
    ],
    ids=lambda value: ascii(value)[-60:],
)
def test_a_damaged_configuration_is_refused_by_its_name(name: str, text: str, weights: Weights, tmp_path: Path) -> None:
    path = save_safetensors(weights, tmp_path / "openai.safetensors")
    (tmp_path / name).write_text(text)
    assert_refused(path)


def test_a_configuration_that_is_no_text_is_refused(weights: Weights, tmp_path: Path) -> None:
    path = save_safetensors(weights, tmp_path / "openai.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert_refused(path, "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert_refused(path, "config.json")


# --- not all of it, or not it


@settings(max_examples=100)
@given(cut=st.floats(0, 1, exclude_max=True), near_the_start=st.booleans())
def test_safetensors_cut_short_anywhere_are_refused(
    cut: float, near_the_start: bool, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.getbasetemp() / "whole-openai.safetensors"
    if not whole.exists():
        save_safetensors(weights, whole)
    size = 12_000 if near_the_start else whole.stat().st_size
    path = Path(QUICK or whole.parent) / f"searchengine-cut-openai-{os.getpid()}.safetensors"
    shutil.copyfile(whole, path)
    os.truncate(path, int(cut * size))
    try:
        assert_refused(path, "fetch it again")
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def archive(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_openai_archive(weights, tmp_path_factory.mktemp("archive")).path


@settings(max_examples=20)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_an_archive_cut_short_anywhere_is_refused(
    cut: float, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut-openai.pt"
    shutil.copyfile(archive, path)
    os.truncate(path, int(cut * archive.stat().st_size))
    assert_refused(path, "fetch it again")


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    seed: int, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "flipped-openai.pt"
    content = bytearray(archive.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    whole = Checkpoint(archive).image_transformer().state_dict() if archive.name == "clip-vit-b-32.pt" else {}
    try:
        loaded = load_all(path)
    except WeightsError:
        return
    for name, tensor in loaded.image_transformer().state_dict().items():
        assert torch.equal(tensor, whole[name])


MISSING = [
    "logit_scale",
    "visual.proj",
    "visual.conv1.weight",
    "visual.class_embedding",
    "visual.ln_pre.bias",
    "visual.positional_embedding",
    "token_embedding.weight",
    "positional_embedding",
    "text_projection",
    "ln_final.weight",
    "transformer.resblocks.0.attn.in_proj_bias",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "visual.transformer.resblocks.1.ln_2.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(name: str, weights: Weights, tmp_path: Path) -> None:
    some = {key: tensor for key, tensor in weights.items() if key != name}
    path = save_safetensors(some, tmp_path / "openai.safetensors")
    with pytest.raises(WeightsError, match="class embedding" if name == "visual.class_embedding" else name):
        Checkpoint(path)


def test_a_missing_block_is_named(weights: Weights, tmp_path: Path) -> None:
    some = {key: tensor for key, tensor in weights.items() if "visual.transformer.resblocks.0." not in key}
    with pytest.raises(WeightsError, match=r"visual\.transformer\.resblocks\.0"):
        Checkpoint(save_safetensors(some, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "logit_bias",
        "visual.ls_1.gamma",
        "transformer.resblocks.0.attn.q_norm.weight",
        "visual.transformer.resblocks.10000000000.ln_1.weight",
        "visual.transformer.resblocks." + "9" * 5000 + ".ln_1.weight",
        "visual.transformer.resblocks.٣.ln_1.weight",
        "visual.transformer.resblocks.01.ln_1.weight",
        "odd\nname\x1b[31m",
    ],
    ids=lambda name: ascii(name)[:50],
)
def test_an_extra_tensor_is_refused(name: str, weights: Weights, tmp_path: Path) -> None:
    assert_refused(save_safetensors({**weights, name: torch.zeros(3)}, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize(
    "name", ["attn_mask", "visual.position_ids", "input_resolution", "context_length", "vocab_size"]
)
def test_what_publishers_store_beside_the_weights_is_no_matter(name: str, weights: Weights, tmp_path: Path) -> None:
    load_all(save_safetensors({**weights, name: torch.zeros(3)}, tmp_path / "openai.safetensors"))


ODD_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "visual.conv1.weight": [(64, 1, 8, 8), (64, 3, 8, 4), (64, 3, 0, 0), (64, 3, 8), (0, 3, 8, 8), (32, 3, 8, 8)],
    "visual.class_embedding": [(63,), (1, 64), ()],
    "visual.positional_embedding": [(0, 64), (1, 64), (9, 64), (12, 64), (10, 32), (640,)],
    "visual.proj": [(32, 64), (64, 0), (64, 16), (64,)],
    "visual.ln_post.bias": [(32,), (64, 1), ()],
    "visual.transformer.resblocks.0.attn.in_proj_weight": [(192, 32), (128, 64), (64, 192)],
    "visual.transformer.resblocks.1.mlp.c_fc.weight": [(128, 64)],
    "token_embedding.weight": [(100, 32), (0, 64), (100,)],
    "positional_embedding": [(77, 32), (0, 64), (77, 0)],
    "text_projection": [(64, 16), (32, 32)],
    "logit_scale": [(2,), (0,)],
}


@pytest.mark.parametrize(
    "name, shape", [(name, shape) for name, shapes in ODD_SHAPES.items() for shape in shapes], ids=str
)
def test_a_tensor_of_another_shape_is_refused(
    name: str, shape: tuple[int, ...], weights: Weights, tmp_path: Path
) -> None:
    assert_refused(save_safetensors({**weights, name: torch.ones(shape)}, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize(
    "shapes", [[(64, 64), (64, 64), (64, 32)], [(32, 64), (96, 64), (64, 64)], [(64, 64), (64,), (64, 64)]]
)
def test_queries_keys_and_values_of_unequal_shapes_are_refused(
    shapes: list[tuple[int, ...]], weights: Weights, tmp_path: Path
) -> None:
    """Also where they add up to the shape of all three."""
    odd = transformers_form(weights)
    for letter, shape in zip("qkv", shapes, strict=True):
        odd[f"vision_model.encoder.layers.0.self_attn.{letter}_proj.weight"] = torch.ones(shape)
    assert_refused(save_safetensors(odd, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["visual.proj", "token_embedding.weight", "visual.transformer.resblocks.1.ln_1.bias", "logit_scale"]
)
def test_a_value_that_is_no_finite_number_is_refused(name: str, value: float, weights: Weights, tmp_path: Path) -> None:
    odd = weights[name].clone()
    odd.view(-1)[-1] = value
    assert_refused(save_safetensors({**weights, name: odd}, tmp_path / "openai.safetensors"), "finite")


def test_a_value_too_great_for_float32_is_refused(weights: Weights, tmp_path: Path) -> None:
    odd = weights["visual.proj"].double()
    odd[0, 0] = 1e300
    assert_refused(save_safetensors({**weights, "visual.proj": odd}, tmp_path / "openai.safetensors"), "finite")
    scale = torch.tensor(1000.0)  # its exponential is what counts
    assert_refused(save_safetensors({**weights, "logit_scale": scale}, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_kind_of_number_are_refused(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    odd = {**weights, "visual.proj": weights["visual.proj"].to(dtype)}
    assert_refused(save_safetensors(odd, tmp_path / "openai.safetensors"))


def test_a_resnet_clip_is_named_as_what_it_is_not(tmp_path: Path) -> None:
    """RN50's names, with OpenAI's conv1 among them."""
    tensors = {
        "visual.conv1.weight": torch.ones(32, 3, 3, 3),
        "visual.layer1.0.conv1.weight": torch.ones(64, 64, 1, 1),
        "visual.attnpool.positional_embedding": torch.ones(50, 2048),
        "positional_embedding": torch.ones(77, 512),
        "text_projection": torch.ones(512, 1024),
        "logit_scale": torch.tensor(4.6),
    }
    assert_refused(save_safetensors(tensors, tmp_path / "openai.safetensors"), "vision transformer", "ViT")


def test_a_siglip_is_refused(weights: Weights, tmp_path: Path) -> None:
    """It has a bias beside the scale, and no class embedding."""
    siglip = transformers_form(weights) | {"logit_bias": torch.tensor(-10.0)}
    assert_refused(save_safetensors(siglip, tmp_path / "openai.safetensors"), "logit_bias")
    del siglip["vision_model.embeddings.class_embedding"]
    assert_refused(save_safetensors(siglip, tmp_path / "openai.safetensors"), "class embedding")


def test_one_side_of_a_clip_is_refused(weights: Weights, tmp_path: Path) -> None:
    for side in ("vision_model", "text_model"):
        half = {name: tensor for name, tensor in transformers_form(weights).items() if name.startswith(side)}
        assert_refused(save_safetensors(half, tmp_path / "openai.safetensors"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff\xe0" + bytes(500),
        b"<!doctype html><title>404</title>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:40d3\nsize 353976522\n",
        b"PK\x05\x06" + bytes(18),
        b"PK\x06\x07" + bytes(12) + b"\2\0\0\0PK\x05\x06" + bytes(18),
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        b"\xff" * 100,
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    ],
    ids=["empty", "jpeg", "html", "pointer", "empty zip", "zip of two disks", "no tensors", "ones", "old torch.save"],
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    for name in ("a-openai.pt", "a-openai.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, name)


def test_what_is_no_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.pt", tmp_path / "odd\n\udcff.pt"):
        with pytest.raises(ModelNotFound, match="there is no file") as caught:
            Checkpoint(path)
        assert "\n" not in str(caught.value)


def test_a_file_whose_name_is_no_utf8_is_a_file_like_any_other(weights: Weights, tmp_path: Path) -> None:
    path = as_torch_file(weights, tmp_path, torch.float32).path.rename(tmp_path / "openai-\udcff.pt")
    load_all(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"openai-\\xff\.pt"):
        Checkpoint(path)
