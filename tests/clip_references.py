"""What the tests of CLIP share: weights drawn at random in each publisher's form, and the reference models.

The drawn weights are unlike those that a network starts with: every bias and every gain of a layer norm is random too,
and attention is far from uniform. Where gains are 1, biases 0 and attention an average, mistakes do not show.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchengine.models.clip import checkpoints, text_numpy
from searchengine.models.clip.architecture import Activation, ClipConfig, TransformerConfig
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.model import Prompts

# --- architectures and weights


def small_config(
    *,
    image_width: int = 128,
    text_width: int = 64,
    image_layers: int = 2,
    text_layers: int = 2,
    patch_size: int = 8,
    side: int = 3,
    dim: int = 32,
    vocabulary: int = 100,
    context: int = 77,
    activation: Activation = "quick_gelu",
) -> ClipConfig:
    """`side`: patches along an edge."""
    return ClipConfig(
        dim=dim,
        image_size=side * patch_size,
        patch_size=patch_size,
        image=TransformerConfig(width=image_width, layers=image_layers, heads=image_width // 64),
        text=TransformerConfig(width=text_width, layers=text_layers, heads=text_width // 64),
        context=context,
        vocabulary=vocabulary,
        activation=activation,
    )


def random_weights(config: ClipConfig, seed: int = 0) -> dict[str, Tensor]:
    """float32, by OpenAI's names. Features come out with a standard deviation of about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + normal(width, std=0.2), f"{name}.bias": normal(width, std=0.2)}

    def product(name: str, inner: int, outer: int, *, gain: float, dot: str = ".") -> dict[str, Tensor]:
        weight = normal(outer, inner, std=gain / math.sqrt(inner))
        return {f"{name}{dot}weight": weight, f"{name}{dot}bias": normal(outer, std=0.2)}

    def blocks(name: str, tower: TransformerConfig) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number in range(tower.layers):
            block, width = f"{name}.resblocks.{number}", tower.width
            tensors |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            tensors |= product(f"{block}.attn.in_proj", width, 3 * width, gain=1.3, dot="_")
            tensors |= product(f"{block}.attn.out_proj", width, width, gain=1)
            tensors |= product(f"{block}.mlp.c_fc", width, 4 * width, gain=1)
            tensors |= product(f"{block}.mlp.c_proj", 4 * width, width, gain=1)
        return tensors

    image, text, patch = config.image.width, config.text.width, config.patch_size
    return {
        "visual.class_embedding": normal(image, std=1),
        "visual.positional_embedding": normal(config.patches + 1, image, std=1),
        "visual.conv1.weight": normal(image, 3, patch, patch, std=1 / math.sqrt(3 * patch * patch)),
        **norm("visual.ln_pre", image),
        **blocks("visual.transformer", config.image),
        **norm("visual.ln_post", image),
        "visual.proj": normal(image, config.dim, std=1 / math.sqrt(image)),
        "token_embedding.weight": normal(config.vocabulary, text, std=1),
        "positional_embedding": normal(config.context, text, std=1),
        **blocks("transformer", config.text),
        **norm("ln_final", text),
        "text_projection": normal(text, config.dim, std=1 / math.sqrt(text)),
        "logit_scale": torch.tensor(4.0) + normal(std=0.1),
    }


RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def transformers_form(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as transformers names and cuts them; no bytes are copied."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if found:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{found[1]}.self_attn.{letter}_proj.{found[2]}"] = part
        else:
            renamed[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    for pattern, replacement in RENAMED:
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    return renamed


# --- ours


class InMemory:
    """Weights that `Checkpoint` reads without a file of gigabytes."""

    metadata: ClassVar[dict[str, str]] = {}

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        return self._tensors[name].numpy()


def our_checkpoint(weights: dict[str, Tensor], activation: Activation, folder: Path) -> Checkpoint:
    """Ours, from weights in memory; the name of an empty file in `folder` tells the activation."""
    path = folder / f"{activation}.safetensors"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "SafetensorsFile", lambda _: InMemory(weights))
        return Checkpoint(path)


@torch.inference_mode()
def our_image_features(checkpoint: Checkpoint, pixels: Tensor) -> Tensor:
    """pixels: float32 (n, s, s, 3). Returns (n, dim)."""
    features: Tensor = checkpoint.image_transformer()(pixels)
    return features


@torch.inference_mode()
def our_text_features(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> Tensor:
    features: Tensor = checkpoint.text_transformer()(Prompts.pack(texts))
    return features


def our_numpy_text_features(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> Tensor:
    """What a search from the command line computes, without torch."""
    return torch.from_numpy(text_numpy.TextTower(checkpoint).encode(texts))


# --- the references: from a state dict with OpenAI's names to what encodes NCHW pixels and padded tokens


class Reference:
    """One of the other implementations. Its weights are those given, not a copy of them."""

    def __init__(self, name: str, config: ClipConfig, weights: dict[str, Tensor]) -> None:
        self._model = BUILDERS[name](config, weights).eval().requires_grad_(False)
        self._context = config.context

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels: float32 (n, s, s, 3). Returns (n, dim)."""
        model, channels_first = self._model, pixels.permute(0, 3, 1, 2).contiguous()
        if hasattr(model, "encode_image"):
            return tensor_of(model.encode_image(channels_first))
        return tensor_of(model.get_image_features(pixel_values=channels_first))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Each text is read at its greatest token, and padded with 0 to the full context. Returns (n, dim)."""
        tokens = torch.tensor([[*text, *[0] * (self._context - len(text))] for text in texts])
        model = self._model
        if hasattr(model, "encode_text"):
            return tensor_of(model.encode_text(tokens))
        return tensor_of(model.get_text_features(input_ids=tokens))


def tensor_of(features: Any) -> Tensor:
    """transformers 5 returns an object, everything else a tensor."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    assert isinstance(found, Tensor)
    return found


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; pip install --no-deps -r tests/references.txt")
    return Path(spec.submodule_search_locations[0])


@cache
def openai_module() -> ModuleType:
    """OpenAI's clip/model.py, under the name that it had when OpenAI wrote its archives."""
    name = "multimodal.model.multimodal_transformer"
    located = importlib.util.spec_from_file_location(name, folder_of("clip") / "model.py")
    assert located and located.loader
    module = importlib.util.module_from_spec(located)
    located.loader.exec_module(module)
    return module


@cache
def open_clip_module() -> ModuleType:
    """open_clip/model.py without the rest of its package, which would import torchvision."""
    folder = folder_of("open_clip")
    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("open_clip")
        package.__path__ = [str(folder)]
        patch.setitem(sys.modules, "open_clip", package)
        misc = ModuleType("torchvision.ops.misc")
        vars(misc).update(FrozenBatchNorm2d=nn.BatchNorm2d)  # of ResNets, which are not built here
        for name, stub in (
            ("torchvision", ModuleType("torchvision")),
            ("torchvision.ops", ModuleType("torchvision.ops")),
            ("torchvision.ops.misc", misc),
            ("timm", None),  # not there, whatever is installed
            ("transformers", None),
        ):
            patch.setitem(sys.modules, name, stub)
        module = importlib.import_module("open_clip.model")
        for name in [name for name in sys.modules if name.startswith("open_clip.")]:
            del sys.modules[name]
    return module


def openai_outline(config: ClipConfig) -> Any:
    """The network without weights."""
    assert config.activation == "quick_gelu", "OpenAI's code has no other"
    with torch.device("meta"):
        return openai_module().CLIP(
            config.dim,
            config.image_size,
            config.image.layers,
            config.image.width,
            config.patch_size,
            config.context,
            config.vocabulary,
            config.text.width,
            config.text.heads,
            config.text.layers,
        )


def openai_model(config: ClipConfig, weights: dict[str, Tensor]) -> Any:
    model = openai_outline(config)
    model.load_state_dict(weights, assign=True)
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()
    return model


def open_clip_model(config: ClipConfig, weights: dict[str, Tensor]) -> Any:
    image, text = config.image, config.text
    with torch.device("meta"):
        model = open_clip_module().CLIP(
            config.dim,
            {
                "image_size": config.image_size,
                "patch_size": config.patch_size,
                "width": image.width,
                "layers": image.layers,
                "head_width": image.width // image.heads,
            },
            {
                "context_length": config.context,
                "vocab_size": config.vocabulary,
                "width": text.width,
                "layers": text.layers,
                "heads": text.heads,
            },
            quick_gelu=config.activation == "quick_gelu",
        )
    model.load_state_dict(weights, assign=True)
    model.attn_mask = torch.full((config.context, config.context), -torch.inf).triu_(1)
    return model


def transformers_outline(config: ClipConfig) -> Any:
    """The network without weights."""
    from transformers import CLIPConfig, CLIPModel

    def tower(side: TransformerConfig) -> dict[str, object]:
        return {
            "hidden_size": side.width,
            "intermediate_size": 4 * side.width,
            "num_hidden_layers": side.layers,
            "num_attention_heads": side.heads,
            "hidden_act": config.activation,
            "projection_dim": config.dim,
        }

    image = tower(config.image) | {"image_size": config.image_size, "patch_size": config.patch_size}
    text = tower(config.text) | {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "eos_token_id": 2,  # stands for: where the greatest token is, as OpenAI does it
    }
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(vision_config=image, text_config=text, projection_dim=config.dim))


def transformers_model(config: ClipConfig, weights: dict[str, Tensor]) -> Any:
    model = transformers_outline(config)
    model.load_state_dict(transformers_form(weights), assign=True)
    for embeddings, count in (
        (model.vision_model.embeddings, config.patches + 1),
        (model.text_model.embeddings, config.context),
    ):
        embeddings.position_ids = torch.arange(count)[None]
    return model


BUILDERS = {"openai": openai_model, "open_clip": open_clip_model, "transformers": transformers_model}


# --- files


def write_openai_archive(path: Path, config: ClipConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A TorchScript archive as OpenAI made its own: traced, most of it in half precision, three numbers as buffers.

    Returns the weights that are in it.
    """
    model = openai_model(config, weights)
    openai_module().convert_weights(model)
    kept = dict(model.state_dict())
    for name, number in (
        ("input_resolution", config.image_size),
        ("context_length", config.context),
        ("vocab_size", config.vocabulary),
    ):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))
    image = torch.zeros(1, 3, config.image_size, config.image_size)
    text = torch.zeros(1, config.context, dtype=torch.int64)
    inputs = {"encode_image": image, "encode_text": text, "forward": (image, text)}
    traced = torch.jit.trace_module(model.eval().requires_grad_(False), inputs, check_trace=False)
    traced.save(str(path))
    return kept


def write_safetensors_header(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "F32") -> None:
    """A safetensors file of true size whose tensors are a hole in the file, which takes no space on disk."""
    size_bytes = {"F32": 4, "F16": 2, "F8_E4M3": 1}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size_bytes * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


# --- bounds


@contextmanager
def little_memory_and_time(*, spare_bytes: int = 768 * 2**20, seconds: int = 15) -> Iterator[None]:
    """What is done within gets MemoryError or TimeoutError: a small file must not bring a machine down."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def give_up(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
