"""Weights in any of the forms that CLIPs are published in -> the towers of `model`.

    OpenAI's .pt            a TorchScript archive
    .pt, .pth               a state dict with OpenAI's names, which open_clip's are too
    model.safetensors       transformers' names, config.json beside it
    .safetensors            OpenAI's names, open_clip_config.json beside it
    .safetensors            either names, written by `searchengine train`, which notes the configuration inside

The architecture is read off names and shapes. The activation must be told: by the code in OpenAI's archive, or as
`configuration` says.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from searchengine.errors import ModelNotFound, WeightsError
from searchengine.models.clip.architecture import Activation, ClipConfig, Shape, TransformerConfig
from searchengine.models.clip.archive import Archive
from searchengine.models.clip.configuration import Configuration, activation_by_name
from searchengine.models.clip.names import NO_WEIGHT, OPENAI, TRANSFORMERS, Naming
from searchengine.models.layers import FloatArray
from searchengine.models.tensors import Array, SafetensorsFile
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.models.clip.model import ImageTransformer, TextTransformer

# Each widens a tensor at a time; more of them would be at the memory's limit.
READING_THREADS = 4

HEAD_WIDTH = 64  # of OpenAI's CLIPs and every text side; open_clip's ViT-H, ViT-g and ViT-bigG have 80, 88 and 104
WIDEST_WITH_HEADS_OF_64 = 1024


class Source(Protocol):
    """A file of named tensors, of any dtype."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What whoever wrote the file noted beside the tensors."""

    def read(self, name: str) -> Array: ...


class Checkpoint:
    """Weights that have been looked at but not loaded: `config` is told, towers are built when they are asked for.

    `activation_source` is `file`, `config` or `name`, whichever told the activation.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelNotFound where there is no file, WeightsError for one that is no CLIP or not all of one."""
        if not path.is_file():
            raise ModelNotFound(f"there is no file {printable(str(path))}")
        self.path = path
        self._source = self._open()
        self._shapes, self._prefix, self._naming = self._recognise()
        inside = Configuration.inside(self._source.metadata, path)
        beside = inside or Configuration.beside(path)
        activation, self.activation_source = self._activation(beside)
        if inside:
            self.activation_source = "file"
        self.config = self._architecture(activation, beside)
        for told, found in ((beside.image_width, self.config.image.width), (beside.text_width, self.config.text.width)):
            if told is not None and told != found:
                raise self._unusable(
                    f"{beside.name} beside it is of a width of {told}, not {found}",
                    "put its publisher's there, or none",
                )
        self._check_names()

    @cached_property
    def logit_scale(self) -> float:
        """The learned inverse temperature, 100 for OpenAI's."""
        with np.errstate(over="ignore"):
            scale = np.exp(self._read("logit_scale").astype(np.float32))
        if scale.size != 1 or not 0 < scale.item() < math.inf:
            raise self._unusable("its logit_scale is not one finite number")
        return float(scale.item())

    def image_transformer(self) -> ImageTransformer:
        """The image tower on the CPU, in float32."""
        from searchengine.models.clip.model import ImageTransformer, filled

        return filled(ImageTransformer, self.config, self.image_tensors())

    def text_transformer(self) -> TextTransformer:
        """The text tower on the CPU, in float32."""
        from searchengine.models.clip.model import TextTransformer, filled

        return filled(TextTransformer, self.config, self.text_tensors())

    def image_tensors(self) -> dict[str, Array]:
        """By the names and of the shapes of `config.image_shapes`, float32."""
        return self._tensors(self._naming.image, self._naming.image_blocks, self.config.image_shapes())

    def text_tensors(self, *, as_stored: Collection[str] = ()) -> dict[str, Array]:
        """By the names and of the shapes of `config.text_shapes`, float32; those `as_stored` 16 to 32-bit floats.

        Arrays that are float32 in the file lie there, mapped, and may not be written to.
        """
        return self._tensors(self._naming.text, self._naming.text_blocks, self.config.text_shapes(), as_stored)

    def with_tensors(
        self, *, image: Mapping[str, FloatArray], text: Mapping[str, FloatArray], logit_scale: float
    ) -> dict[str, Array]:
        """All weights by their publisher's names, with some of `image_tensors` and of `text_tensors` replaced."""
        tensors = {name: self._read(name) for name in self._shapes if not NO_WEIGHT.fullmatch(name)}
        for names, replaced in ((self._naming.image, image), (self._naming.text, text)):
            for name, tensor in replaced.items():
                transposed = name == "projection.weight" and self._naming.projections_transposed
                tensors[names[name]] = tensor.T if transposed else tensor
        tensors["logit_scale"] = np.array(math.log(logit_scale), np.float32).reshape(self._shapes["logit_scale"])
        return {name: np.require(tensor, requirements=["C"]) for name, tensor in tensors.items()}

    def _open(self) -> Source:
        try:
            return Archive(self.path) if zipfile.is_zipfile(self.path) else SafetensorsFile(self.path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise WeightsError(
                f"{printable(str(self.path))} cannot be used as weights: it is cut short, damaged, or neither "
                f"safetensors nor a zip of torch's ({printable(str(error))}); fetch it again, or save it anew with a "
                "newer torch"
            ) from None

    def _recognise(self) -> tuple[dict[str, tuple[int, ...]], str, Naming]:
        """Shapes by name, less what a training program put before the names; that prefix; and whose names they are."""
        for naming in (OPENAI, TRANSFORMERS):
            mark = naming.image["patches.weight"]
            for name, shape in self._source.shapes.items():
                if name.endswith(mark) and len(shape) == 4:
                    prefix = name.removesuffix(mark)
                    shapes = {
                        name.removeprefix(prefix): shape
                        for name, shape in self._source.shapes.items()
                        if name.startswith(prefix)
                    }
                    if naming.image["class_token"] in shapes:
                        return shapes, prefix, naming
        raise self._unusable(
            f"its {len(self._source.shapes)} tensors are not those of a CLIP with a vision transformer (no "
            f"{OPENAI.image['patches.weight']} with a class embedding)",
            "give a ViT checkpoint of OpenAI's, of open_clip or of transformers' CLIPModel",
        )

    def _architecture(self, activation: Activation, beside: Configuration) -> ClipConfig:
        image, text = self._naming.image, self._naming.text
        width, channels, patch_size, _ = self._shape(image["patches.weight"], 4)
        tokens, image_width = self._shape(image["positions"], 2)
        context, text_width = self._shape(text["positions"], 2)
        vocabulary, _ = self._shape(text["tokens"], 2)
        projection = self._shape(image["projection.weight"], 2)
        side = math.isqrt(max(tokens - 1, 0))
        if channels != 3 or side < 1 or side * side != tokens - 1 or image_width != width or patch_size < 1:
            raise self._unusable(
                f"its image side has {channels} channels and {tokens} positions, which no published CLIP has"
            )
        if min(context, vocabulary, *projection) < 1:
            raise self._unusable("some of its tensors are empty")
        return ClipConfig(
            dim=projection[1] if self._naming.projections_transposed else projection[0],
            image_size=side * patch_size,
            patch_size=patch_size,
            image=self._transformer(width, self._naming.image_blocks, beside.image_heads),
            text=self._transformer(text_width, self._naming.text_blocks, beside.text_heads),
            context=context,
            vocabulary=vocabulary,
            activation=activation,
        )

    def _transformer(self, width: int, blocks: str, heads: int | None) -> TransformerConfig:
        numbers = {name[len(blocks) :].partition(".")[0] for name in self._shapes if name.startswith(blocks)}
        if heads is None and width > WIDEST_WITH_HEADS_OF_64 and blocks == self._naming.image_blocks:
            raise self._unusable(
                f"at a width of {width} it does not say how many attention heads it has",
                "put its publisher's config.json or open_clip_config.json beside it",
            )
        heads = width // HEAD_WIDTH if heads is None else heads
        if heads < 1 or width < 1 or width % heads:
            raise self._unusable(f"a width of {width} cannot be divided into {heads} heads")
        return TransformerConfig(width=width, layers=len(numbers), heads=heads)

    def _activation(self, beside: Configuration) -> tuple[Activation, Literal["file", "config", "name"]]:
        if isinstance(self._source, Archive) and self._source.mentions("QuickGELU"):
            return "quick_gelu", "file"
        if beside.activation is not None:
            return beside.activation, "config"
        named = activation_by_name(self.path)
        if named is not None:
            return named, "name"
        raise self._unusable(
            "it does not say which activation it was trained with",
            "put quickgelu or gelu into its name, as its publisher says, or his config.json beside it",
        )

    def _check_names(self) -> None:
        expected = {"logit_scale"}
        for names, blocks, layers in (
            (self._naming.image, self._naming.image_blocks, self.config.image.layers),
            (self._naming.text, self._naming.text_blocks, self.config.text.layers),
        ):
            expected.update(names.values())
            for number in range(layers):
                expected.update(f"{blocks}{number}.{name}" for parts in self._naming.block.values() for name in parts)
        missing = sorted(expected - self._shapes.keys())
        extra = sorted(name for name in self._shapes.keys() - expected if not NO_WEIGHT.fullmatch(name))
        for odd, what in ((missing, "lacks"), (extra, "has, beyond those of this architecture,")):
            if odd:
                raise self._unusable(f"it {what} {len(odd)} tensors, the first of them {printable(odd[0])}")

    def _tensors(
        self, names: Mapping[str, str], blocks: str, shapes: Mapping[str, Shape], as_stored: Collection[str] = ()
    ) -> dict[str, Array]:
        def tensor(name: str) -> Array:
            return self._tensor(name, names, blocks, shape=shapes[name], as_stored=name in as_stored)

        with ThreadPoolExecutor(READING_THREADS) as pool:
            return dict(zip(shapes, pool.map(tensor, shapes), strict=True))

    def _tensor(self, name: str, names: Mapping[str, str], blocks: str, *, shape: Shape, as_stored: bool) -> Array:
        if name in names:
            tensor = self._read(names[name])
        else:
            _, number, part = name.split(".", 2)
            pieces = [self._read(f"{blocks}{number}.{piece}") for piece in self._naming.block[part]]
            if len({piece.shape for piece in pieces}) > 1:
                raise self._unusable(f"the shapes of {', '.join(self._naming.block[part])} differ")
            tensor = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if name == "patches.weight":  # (w, 3, p, p) as a convolution; here pixels come channel last
            tensor = tensor.transpose(0, 2, 3, 1).reshape(len(tensor), -1)
        if name == "projection.weight" and self._naming.projections_transposed:
            tensor = tensor.T
        if tensor.shape != shape:
            raise self._unusable(f"{name} has shape {tensor.shape} where {shape} is due")
        if tensor.dtype.kind != "f":
            raise self._unusable(f"{name} holds {tensor.dtype}, not 16 to 64-bit floating point numbers")
        if not as_stored or tensor.itemsize > 4:
            with np.errstate(over="ignore"):  # what is too great becomes infinite, and is refused as that
                tensor = np.require(tensor, np.float32, ["C", "A"])
        if not _is_finite(tensor):
            raise self._unusable(f"{name} has values that are not finite numbers")
        return tensor

    def _read(self, name: str) -> Array:
        try:
            return self._source.read(self._prefix + name)
        except ValueError as error:
            raise self._unusable(printable(str(error))) from None

    def _shape(self, name: str, dims: int) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None or len(shape) != dims:
            raise self._unusable(f"it has no {name} of {dims} dimensions")
        return shape

    def _unusable(self, reason: str, remedy: str = "fetch it again, or give another") -> WeightsError:
        return WeightsError(f"{printable(str(self.path))} cannot be used as CLIP weights: {reason}; {remedy}")


def _is_finite(values: Array) -> bool:
    """As np.isfinite(values).all(), which widens each half first and takes ten times as long."""
    if values.dtype != np.float16 or not values.size:
        return bool(np.isfinite(values).all())
    # Infinite and NaN are the highest bit patterns of either sign.
    return bool(values.view(np.int16).max() < 0x7C00 and values.view(np.uint16).max() < 0xFC00)
