"""What the publisher of a checkpoint tells beside its tensors: the activation, and the number of heads.

Neither shows in names and shapes. A wrong activation costs quality without a word, so it is told or the weights are
refused: by the configuration beside the file, or by the file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searchengine.errors import WeightsError
from searchengine.models.clip.architecture import Activation
from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION
from searchengine.text import printable

# Parts of names in open_clip's list of published weights, each of which was trained with that activation throughout.
# https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/pretrained.py
ACTIVATION_BY_NAME: tuple[tuple[str, Activation], ...] = (
    (r"quick[-_. ]?gelu", "quick_gelu"),
    (r"(?<![a-z])(?<!quick[-_. ])gelu(?![a-z])", "gelu"),
    (r"openai|^clip-vit-(b-32|b-16|l-14|l-14-336)$", "quick_gelu"),  # the latter are OpenAI's in `published`
    (r"metaclip_(400m|fullcc)", "quick_gelu"),
    (r"dfn2b(?!.*39b)", "quick_gelu"),
    (r"laion2b|datacomp|commonpool", "gelu"),
)
# The note inside a file that `searchengine train` wrote.
FORMAT, VERSION = "searchengine-clip", 1

# What a name says outright, before what it lets one conclude.
OUTRIGHT = 2


def activation_by_name(path: Path) -> Activation | None:
    """What the name of the file, or else that of its folder, tells."""
    for name in (path.stem.lower(), path.absolute().parent.name.lower()):
        for entries in (ACTIVATION_BY_NAME[:OUTRIGHT], ACTIVATION_BY_NAME[OUTRIGHT:]):
            told = {activation for pattern, activation in entries if re.search(pattern, name)}
            if told:
                return told.pop() if len(told) == 1 else None
    return None


# What `preprocess` and `decode` do, in open_clip's words.
PREPROCESSING = {
    "mean": list(MEAN),
    "std": list(STANDARD_DEVIATION),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a publisher's configuration tells that the tensors do not. None: it does not tell."""

    activation: Activation | None = None
    image_heads: int | None = None
    text_heads: int | None = None
    image_width: int | None = None
    text_width: int | None = None
    name: str = ""  # of the file

    @classmethod
    def inside(cls, metadata: Mapping[str, str], path: Path) -> Configuration | None:
        """What `searchengine train` noted in a file; None for any other. Raises WeightsError where that is damaged."""
        if FORMAT not in metadata:
            return None
        try:
            noted = json.loads(metadata[FORMAT])
            if noted["version"] != VERSION or noted["activation"] not in ("quick_gelu", "gelu"):
                raise ValueError(f"version {noted['version']}, activation {noted['activation']}")
            return cls(
                activation=noted["activation"],
                image_heads=_count(noted["image_heads"]),
                text_heads=_count(noted["text_heads"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{printable(str(path))} is of this program, but what it notes of its weights cannot be understood "
                f"({type(error).__name__}: {error}); train it again, or upgrade searchengine"
            ) from None

    @classmethod
    def beside(cls, path: Path) -> Configuration:
        """Raises WeightsError for a configuration that is there and cannot be understood."""
        for name, read in (("open_clip_config.json", cls._of_open_clip), ("config.json", cls._of_transformers)):
            file = path.parent / name
            try:
                content = json.loads(file.read_text("utf-8"))
                found = read(content)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise WeightsError(
                    f"{printable(str(file))} tells nothing of CLIP weights ({type(error).__name__}: {error}); "
                    "put its publisher's file there, or none"
                ) from None
            if found is not None:
                return replace(found, name=name)
        return cls()

    @classmethod
    def _of_transformers(cls, content: dict[str, Any]) -> Configuration | None:
        if content.get("model_type") != "clip":
            return None
        image, text = content["vision_config"], content["text_config"]
        # transformers leaves out what has its default value.
        activations = {side.get("hidden_act", "quick_gelu") for side in (image, text)}
        epsilons = {side.get("layer_norm_eps", 1e-5) for side in (image, text)}
        if not activations <= {"quick_gelu", "gelu"} or len(activations) > 1 or epsilons != {1e-5}:
            raise ValueError(f"activations {sorted(activations)} with epsilons {sorted(epsilons)} are unknown here")
        return cls(
            activation=activations.pop(),
            image_heads=_count(image.get("num_attention_heads", 12)),
            text_heads=_count(text.get("num_attention_heads", 8)),
            image_width=_count(image.get("hidden_size", 768)),
            text_width=_count(text.get("hidden_size", 512)),
        )

    @classmethod
    def _of_open_clip(cls, content: dict[str, Any]) -> Configuration | None:
        model = content["model_cfg"]
        image, text = model["vision_cfg"], model["text_cfg"]
        quick, pixels = model.get("quick_gelu", False), content.get("preprocess_cfg", {})
        if type(quick) is not bool:
            raise ValueError(f"quick_gelu is {quick!r}")
        for key, ours in PREPROCESSING.items():
            if pixels.get(key, ours) != ours:
                raise ValueError(f"it wants photos with a {key} of {pixels[key]}, not {ours}")
        return cls(
            activation="quick_gelu" if quick else "gelu",
            image_heads=_count(image["width"]) // _count(image.get("head_width", 64)),
            text_heads=_count(text["heads"]),
            image_width=_count(image["width"]),
            text_width=_count(text["width"]),
        )


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no number of heads or channels")
    return value
