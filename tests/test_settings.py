"""Settings: four layers, each named where it sets a value or a bad one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from searchengine.cli.options import limits_from
from searchengine.decode import DecodeLimits
from searchengine.errors import SettingError
from searchengine.settings import NAMES, load_settings, user_file


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own config.toml, which each test starts without."""
    for name in [name for name in os.environ if name.startswith("SEARCHENGINE_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "config.toml"
    monkeypatch.setenv("SEARCHENGINE_CONFIG", str(file))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return file


def test_the_defaults_set_everything() -> None:
    settings = load_settings()
    assert set(settings.origins) == set(NAMES)
    assert set(settings.origins.values()) == {"default"}
    assert (settings.model, settings.batch_size, settings.max_pixels) == ("auto", 32, 178_956_970)


def test_each_layer_wins_over_the_one_below(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('workers = 1\nbatch_size = 1\nmodel = "file"\n')
    monkeypatch.setenv("SEARCHENGINE_WORKERS", "2")
    monkeypatch.setenv("SEARCHENGINE_BATCH_SIZE", "2")
    settings = load_settings({"workers": 3, "batch_size": None})
    assert (settings.workers, settings.batch_size, settings.model, settings.device) == (3, 2, "file", "auto")
    assert settings.origins["workers"] == "flag"
    assert settings.origins["batch_size"] == "environment"
    assert settings.origins["model"] == str(config)
    assert settings.origins["device"] == "default"


def test_an_empty_variable_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_MODEL", "")
    assert load_settings().origins["model"] == "default"


@pytest.mark.parametrize(
    "line",
    [
        "workers = -1",
        "workers = 1025",
        "batch_size = 0",
        "batch_size = 2.7",
        "batch_size = 8.0",
        "workers = inf",
        "workers = nan",
        "workers = true",
        'workers = "many"',
        "max_pixels = 178956971",
        "max_decode_seconds = 0",
        "max_decode_seconds = 0.5",
        "max_decode_memory_bytes = 67108863",
        "model = 7",
        'precision = "fp8"',
        "precision = 32",
        "offline = 2",
        'offline = "perhaps"',
        "offline = []",
        'mirror = "ftp://127.0.0.1/"',
        'mirror = "weights"',
        'mirror = "http://"',
        'warm = "on"',
        "warm = true",
        "warm_idle_seconds = 0",
        "colour = 1",
        "[workers]\na = 1",
        "workers = ",
        "workers = [1]",
        "workers = 2020-01-01",
    ],
)
def test_a_bad_value_in_the_file_names_the_file(config: Path, line: str) -> None:
    config.write_text(line + "\n")
    with pytest.raises(SettingError) as error:
        load_settings()
    assert str(config) in str(error.value)


def test_a_file_that_is_no_text_or_a_folder_is_named(config: Path) -> None:
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="config.toml cannot be read"):
        load_settings()
    config.unlink()
    config.mkdir()
    with pytest.raises(SettingError, match="config.toml cannot be read"):
        load_settings()


@pytest.mark.parametrize("value", ["many", "1.5", "-1", "1e3", "9" * 5000])
def test_a_bad_value_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SEARCHENGINE_WORKERS", value)
    with pytest.raises(SettingError, match="setting workers in environment"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "offline"),
    [("1", True), ("true", True), ("Yes", True), ("ON", True), ("0", False), ("false", False), ("no", False)],
)
def test_a_switch_can_be_written_in_the_usual_ways(monkeypatch: pytest.MonkeyPatch, text: str, offline: bool) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", text)
    assert load_settings().offline is offline


def test_a_switch_in_the_file_is_a_switch_and_the_environment_wins_over_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("offline = true\n")
    assert load_settings().offline is True
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "0")
    assert load_settings().offline is False


def test_a_bad_switch_tells_what_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "maybe")
    with pytest.raises(SettingError, match="offline in environment is 'maybe', but must be true or false"):
        load_settings()


def test_a_bad_precision_tells_the_choice() -> None:
    with pytest.raises(SettingError, match="precision in flag is 'fp8', but must be fp32, bf16, fp16 or int8"):
        load_settings({"precision": "fp8"})


def test_a_bad_flag_tells_the_range() -> None:
    with pytest.raises(SettingError, match="batch_size in flag is 0, but must be a whole number from 1 to 65536"):
        load_settings({"batch_size": 0})


def test_the_limits_of_decoding_are_those_that_the_settings_name() -> None:
    assert limits_from(load_settings()) == DecodeLimits()
    flags = {"max_pixels": 1, "max_file_bytes": 2, "max_decode_seconds": 3, "max_decode_memory_bytes": 2**26}
    limits = DecodeLimits(max_pixels=1, max_file_bytes=2, max_seconds=3, max_memory_bytes=2**26)
    assert limits_from(load_settings(flags)) == limits


def test_an_unknown_setting_lists_the_known_ones(config: Path) -> None:
    config.write_text("wrokers = 1\n")
    with pytest.raises(SettingError, match=r"unknown setting wrokers in .*; known are: index, models, model"):
        load_settings()


def test_folders_that_are_not_set_lie_in_the_users_data(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.index_folder == tmp_path / "share" / "searchengine" / "index"
    assert settings.models_folder == tmp_path / "share" / "searchengine" / "models"


def test_the_tilde_in_a_folder_is_the_home_folder(tmp_path: Path) -> None:
    assert load_settings({"index": "~/photos.index"}).index_folder == tmp_path / "photos.index"
    assert load_settings({"index": "~no-such-user/x"}).index_folder == Path("~no-such-user/x")


def test_the_users_file_can_be_named(config: Path) -> None:
    assert user_file() == config
