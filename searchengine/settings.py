"""Settings, typed, and where each value came from.

config/default.toml < the user's config.toml < SEARCHENGINE_* in the environment < flags.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from searchengine.errors import SettingError, UsageError
from searchengine.index.layout import PRECISIONS
from searchengine.milvus import is_milvus
from searchengine.resources import resource
from searchengine.text import printable

ENVIRONMENT_PREFIX = "SEARCHENGINE_"
BOUNDS = {
    "workers": (0, 1024),
    "batch_size": (1, 65536),
    "max_pixels": (1, 178_956_970),
    "max_file_bytes": (1, 2**40),
    "max_decode_seconds": (1, 86_400),
    "max_decode_memory_bytes": (64 * 2**20, 2**40),
    "warm_idle_seconds": (1, 604_800),
}
SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
# What a text must match, and that in words.
FORMS = {
    "device": (
        r"auto|(cpu|mps|cuda(:\d+)?)(,(cpu|mps|cuda(:\d+)?))*",
        "auto, cpu, cuda, cuda:N or mps, or several of them, as in cuda:0,cuda:1",
    ),
    "precision": ("|".join(PRECISIONS), f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"),
    "mirror": (r"(https?://[^\s/]\S*)?", "the http or https address of a folder, or empty"),
    "warm": (r"off|use|auto", "off, use or auto"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The meaning of each is told in config/default.toml. `origins` names, for each setting, what set it."""

    index: str
    models: str
    model: str
    precision: str
    device: str
    offline: bool
    mirror: str
    workers: int
    batch_size: int
    max_pixels: int
    max_file_bytes: int
    max_decode_seconds: int
    max_decode_memory_bytes: int
    warm: str
    warm_idle_seconds: int
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def index_place(self) -> str:
        """The folder of the index, or its address in Milvus."""
        return self.index if is_milvus(self.index) else str(self.index_folder)

    @property
    def index_folder(self) -> Path:
        """Raises UsageError where the index is in Milvus."""
        if is_milvus(self.index):
            raise UsageError(
                f"{printable(self.index)} is in Milvus, and this command works on an index in a folder; copy it to one "
                "with: searchengine copy"
            )
        return Path(os.path.expanduser(self.index)) if self.index else user_data() / "index"

    @property
    def models_folder(self) -> Path:
        return Path(os.path.expanduser(self.models)) if self.models else user_data() / "models"


NAMES = tuple(f.name for f in fields(Settings) if f.name != "origins")


def user_file() -> Path:
    """The user's own config.toml, which need not exist; SEARCHENGINE_CONFIG names another."""
    override = os.environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    if override:
        return Path(override)
    return platformdirs.user_config_path("searchengine", appauthor=False) / "config.toml"


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Put the layers together; a flag that is None was not given. Raises SettingError that names the layer."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in (
        ("default", _read_toml(resource("default.toml"))),
        (str(user_file()), _read_toml(user_file())),
        ("environment", _environment()),
        ("flag", {name: value for name, value in (flags or {}).items() if value is not None}),
    ):
        for name, value in layer.items():
            values[name] = _checked(name, value, origin)
            origins[name] = origin
    return Settings(**values, origins=origins)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingError(f"the settings in {printable(str(path))} cannot be read: {error}") from None


def _environment() -> dict[str, str]:
    return {
        name: os.environ[ENVIRONMENT_PREFIX + name.upper()]
        for name in NAMES
        if os.environ.get(ENVIRONMENT_PREFIX + name.upper())
    }


def _checked(name: str, value: Any, origin: str) -> Any:
    if name not in NAMES:
        raise SettingError(f"unknown setting {printable(name)} in {printable(origin)}; known are: {', '.join(NAMES)}")
    checked: Any
    if name == "offline":
        checked, expected = SWITCHES.get(str(value).lower()), "true or false"
    elif name in BOUNDS:
        checked, expected = _whole_number(value, *BOUNDS[name]), "a whole number from {} to {}".format(*BOUNDS[name])
    else:
        form, expected = FORMS.get(name, (r"(?s:.*)", "text"))
        checked = value if isinstance(value, str) and re.fullmatch(form, value) else None
    if checked is None:
        raise SettingError(f"setting {name} in {printable(origin)} is {value!r}, but must be {expected}")
    return checked


def _whole_number(value: Any, low: int, high: int) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if low <= number <= high and not isinstance(value, bool | float) else None


def user_data() -> Path:
    return platformdirs.user_data_path("searchengine", appauthor=False)
