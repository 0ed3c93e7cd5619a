"""The command line as a user meets it: real photos, the real encoder mini, real processes where it matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commandline import Cli, Outcome
from conftest import painted
from PIL import Image

from searchengine.cli import COMMANDS
from searchengine.cli.interrupts import ctrl_c_stops

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def offline(own_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs that scikit-image and scikit-learn ship."""
    folder = tmp_path_factory.mktemp("library") / "photos"
    subprocess.run([sys.executable, ROOT / "scripts/sample_photos.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def indexed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `library` by mini, made once by a real process. Tests only read it."""
    index = tmp_path_factory.mktemp("indexed") / "photos.index"
    run = [sys.executable, "-m", "searchengine", "index", library, "--index", index, "--model", "mini", "--json"]
    done = subprocess.run(run, check=True, capture_output=True, cwd=ROOT, text=True)
    assert json.loads(done.stdout)["added"] == len(list(library.iterdir()))
    return index


def names(outcome: Outcome) -> list[str]:
    return [os.path.basename(line["path"]) for line in outcome.lines]


# -- the main job ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("a cup of coffee", "coffee.png"),
        ("a cat", "chelsea.png"),
        ("a motorcycle", "motorcycle_left.png"),
        ("a flower", "flower.jpg"),
        ("a rocket launch", "rocket.jpg"),
    ],
)
def test_a_description_finds_its_photo_first(cli: Cli, indexed: Path, query: str, name: str) -> None:
    found = cli("search", query, "-k", "2", "--index", indexed, "--json")
    assert found.code == 0
    assert name in names(found)


def test_json_hits_have_the_promised_keys_in_order_of_score(cli: Cli, indexed: Path) -> None:
    hits = cli("search", "a cat", "--index", indexed, "--json").lines
    assert list(hits[0]) == ["rank", "score", "relevance", "id", "store", "path", "taken_at", "width", "height"]
    assert [hit["rank"] for hit in hits] == list(range(1, 11))
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert all(-1 <= hit["score"] <= 1 and 0 <= hit["relevance"] <= 1 for hit in hits)


def test_a_query_may_be_written_without_quotes(cli: Cli, indexed: Path) -> None:
    quoted = cli("search", "a cup of coffee", "--index", indexed, "--json")
    assert cli("search", "a", "cup", "of", "coffee", "--index", indexed, "--json").out == quoted.out


def test_pages_by_offset_join_without_gap_or_overlap(cli: Cli, indexed: Path) -> None:
    whole = cli("search", "a cat", "-k", "6", "--index", indexed, "--json").lines
    second = cli("search", "a cat", "-k", "3", "--offset", "3", "--index", indexed, "--json").lines
    assert second == whole[3:]


def test_an_existing_path_is_an_image_query_and_plain_words_never_are(
    cli: Cli, indexed: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(library)
    by_image = cli("search", "./motorcycle_left.png", "-k", "1", "--index", indexed, "--json")
    assert names(by_image) == ["motorcycle_right.png"]
    by_text = cli("search", "coffee.png", "-k", "1", "--index", indexed, "--json")
    assert names(by_text) == ["coffee.png"], "an image query would have left the photo itself out"


def test_similar_by_id_equals_similar_by_path_and_leaves_itself_out(cli: Cli, indexed: Path, library: Path) -> None:
    by_path = cli("similar", library / "chelsea.png", "--index", indexed, "--json")
    own_id = cli("search", "a cat", "-k", "1", "--index", indexed, "--json").lines[0]["id"]
    by_id = cli("similar", str(own_id), "--index", indexed, "--json")
    assert by_id.out == by_path.out
    assert "chelsea.png" not in names(by_id)


def test_a_picture_that_is_not_indexed_finds_its_like(cli: Cli, indexed: Path, library: Path, tmp_path: Path) -> None:
    with Image.open(library / "coffee.png") as photo:
        photo.resize((300, 200)).save(tmp_path / "smaller.jpg")
    found = cli("similar", tmp_path / "smaller.jpg", "-k", "1", "--index", indexed, "--json")
    assert names(found) == ["coffee.png"]
    assert found.lines[0]["score"] > 0.9


def test_like_and_not_combine_with_the_text(cli: Cli, indexed: Path, library: Path) -> None:
    like = cli("search", "--like", library / "motorcycle_left.png", "-k", "2", "--index", indexed, "--json")
    assert "motorcycle_right.png" in names(like)
    both = cli("search", "a vehicle", "--not", "a motorcycle", "-k", "18", "--index", indexed, "--json")
    plain = cli("search", "a vehicle", "-k", "18", "--index", indexed, "--json")
    assert names(both).index("motorcycle_left.png") > names(plain).index("motorcycle_left.png")


# -- shapes of results -----------------------------------------------------------------------------------------------


def test_the_table_shows_every_hit_on_one_line(cli: Cli, indexed: Path) -> None:
    found = cli("search", "a cup of coffee", "-k", "3", "--index", indexed)
    assert found.code == 0
    assert sum("/photos/" in line for line in found.out.splitlines()) == 3
    assert "coffee.png" in found.out


def test_paths_are_one_a_line_and_nul_separated_on_request(cli: Cli, indexed: Path, library: Path) -> None:
    lines = cli("search", "a cat", "--threshold", "none", "--format", "paths", "-k", "2", "--index", indexed)
    assert lines.out.count("\n") == 2
    assert str(library / "chelsea.png") in lines.out.splitlines()
    nul = cli("search", "a cat", "--threshold", "none", "-0", "-k", "2", "--index", indexed)
    assert nul.out.split("\0")[:-1] == lines.out.splitlines()


def test_paths_hold_only_matches_and_no_match_is_exit_1(cli: Cli, indexed: Path) -> None:
    strict = cli("search", "a cat", "--threshold", "0.999", "--format", "paths", "--index", indexed)
    assert (strict.code, strict.out) == (1, "")
    kept = cli("search", "a cat", "--format", "paths", "--index", indexed)
    everything = cli("search", "a cat", "-k", "10", "--index", indexed, "--json").lines
    assert len(kept.out.splitlines()) == sum(hit["relevance"] >= 0.5 for hit in everything)


def test_the_contact_sheet_is_a_picture_with_a_tile_for_each_hit(cli: Cli, indexed: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert cli("search", "a cat", "-k", "7", "--sheet", sheet, "--index", indexed).code == 0
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1200
        assert picture.height > 600, "seven hits take two rows"
        assert len(picture.getcolors(maxcolors=2**24) or []) > 1000, "photos, not empty tiles"


def test_the_page_is_self_contained_and_escapes_what_it_shows(cli: Cli, tmp_path: Path, library: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(library / "coffee.png", folder / "<script>alert(1)<&.png")
    cli("index", folder, "--index", tmp_path / "i", "--model", "mini")
    page = tmp_path / "page.html"
    assert cli("search", "<b>coffee</b>", "--html", page, "--index", tmp_path / "i").code == 0
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert "<b>coffee" not in text
    assert "data:image/jpeg;base64," in text
    assert "http://" not in text
    assert "https://" not in text


def test_previews_draw_the_pictures_in_the_terminal(cli: Cli, indexed: Path) -> None:
    found = cli("search", "a cat", "-k", "1", "--preview", "--index", indexed)
    assert found.out.count("▀") > 200
    assert "\x1b[38;2;" in found.out


def test_tables_hold_no_escape_codes_when_they_go_to_a_file(cli: Cli, indexed: Path) -> None:
    assert "\x1b" not in cli("search", "a cat", "--index", indexed).out


# -- index, status, models, config -----------------------------------------------------------------------------------


def test_index_reports_all_promised_counters_and_a_second_run_does_nothing(
    cli: Cli, library: Path, tmp_path: Path
) -> None:
    keys = "scanned added updated moved deleted unchanged duplicates failed seconds images_per_second model".split()
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("coffee.png", "chelsea.png"):
        shutil.copy(library / name, folder)
    shutil.copy(library / "coffee.png", folder / "copy.png")
    (folder / "broken.jpg").write_text("this is no picture")
    first = cli("index", folder, "--index", tmp_path / "i", "--model", "mini", "--json")
    report = json.loads(first.out)
    assert first.code == 0
    assert list(report) == [*keys, "unlistable", "ignored", "seconds_by_stage"]
    assert {k: report[k] for k in ("scanned", "added", "duplicates", "failed", "model")} == {
        "scanned": 4, "added": 3, "duplicates": 1, "failed": 1, "model": "mini",
    }  # fmt: skip
    assert first.err.count("broken.jpg") == 1
    second = json.loads(cli("index", folder, "--index", tmp_path / "i", "--json").out)
    assert (second["added"], second["updated"], second["unchanged"], second["failed"]) == (0, 0, 3, 1)
    failures = cli("status", "--failures", "--index", tmp_path / "i")
    assert failures.out == f"{folder}/broken.jpg: not a picture in a supported format\n"


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(cli: Cli, library: Path, tmp_path: Path) -> None:
    told = cli("index", library, "--index", tmp_path / "i", "--dry-run", "--json")
    assert json.loads(told.out)["added"] == len(list(library.iterdir()))
    assert not (tmp_path / "i").exists()


def test_status_has_the_promised_keys(cli: Cli, indexed: Path, library: Path) -> None:
    status = json.loads(cli("status", "--index", indexed, "--json").out)
    promised = (
        "images vectors segments failures model fingerprint dim precision index_kind recall_at_10 size_bytes last_run "
        "vectors_not_in_ann resident_bytes_per_vector model_change"
    )
    assert list(status) == promised.split()
    assert (status["images"], status["model"], status["dim"]) == (len(list(library.iterdir())), "mini", 512)
    assert "images" in cli("status", "--index", indexed).out


def test_models_lists_mini_as_here(cli: Cli) -> None:
    mini = cli("models", "--json").lines[0]
    assert (mini["name"], mini["dim"], mini["downloaded"]) == ("mini", 512, True)
    assert cli("models", "download", "mini", "--json").lines == [mini]


def test_trained_heads_are_an_encoder_that_can_be_imported_and_used_by_name(
    cli: Cli, library: Path, tmp_path: Path
) -> None:
    captions = [
        {"file": f.name, "captions": [f"a picture of {f.stem}", f"this is {f.stem}"]} for f in library.iterdir()
    ]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    heads = tmp_path / "mine.safetensors"
    trained = cli(
        "train", tmp_path / "captions.json", "--images", library, "--out", heads, "--epochs", "2", "--json"
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["photos"] > 0
    assert cli("models", "import", heads, "--json").lines[0]["name"] == "mine"
    indexed = cli("index", library, "--index", tmp_path / "i", "--model", "mine", "--json")
    assert json.loads(indexed.out)["model"] == "mine"
    assert cli("search", "coffee", "--index", tmp_path / "i", "--json").code == 0
    other = cli("index", library, "--index", tmp_path / "i", "--model", "mini")
    assert (other.code, "mine" in other.err) == (4, True)


def test_config_shows_each_value_and_where_it_came_from(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("batch_size = 8\nworkers = 2\n")
    monkeypatch.setenv("SEARCHENGINE_CONFIG", str(file))
    monkeypatch.setenv("SEARCHENGINE_WORKERS", "3")
    shown = json.loads(cli("config", "--json").out)
    assert shown["batch_size"] == {"value": 8, "origin": str(file)}
    assert shown["workers"] == {"value": 3, "origin": "environment"}
    assert shown["max_pixels"]["origin"] == "default"
    assert "batch_size" in cli("config").out


def test_evaluate_has_the_promised_keys_with_and_without_an_index(
    cli: Cli, indexed: Path, library: Path, tmp_path: Path
) -> None:
    captions = tmp_path / "captions.json"
    about = {"coffee.png": "a cup of coffee", "chelsea.png": "a cat", "flower.jpg": "a flower", "gone.jpg": "nothing"}
    captions.write_text(json.dumps([{"file_name": name, "captions": [text]} for name, text in about.items()]))
    outcome = cli("evaluate", captions, "--images", library, "--index", indexed, "--json")
    result = json.loads(outcome.out)
    assert list(result["text_to_image"]) == ["recall@1", "recall@5", "recall@10", "median_rank"]
    assert (result["images"], result["captions"], result["model"]) == (3, 3, "mini")
    assert result["text_to_image"]["recall@5"] == 1.0
    assert "gone.jpg" in outcome.err
    without = json.loads(cli("evaluate", captions, "--images", library, "--index", tmp_path / "none", "--json").out)
    assert without == result, "vectors from the index are those that a fresh encoding gives"


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "", "--index", "{index}"], 2, ["empty"]),
        (["search", "--index", "{index}"], 2, ["empty"]),
        (["search", "x", "--index", "{tmp}/none"], 3, ["no index", "searchengine index"]),
        (["search", "x", "-k", "0", "--index", "{index}"], 2, ["-k"]),
        (["search", "x", "--threshold", "high", "--index", "{index}"], 2, ["--threshold"]),
        (["search", "x", "--after", "soon", "--index", "{index}"], 2, ["soon"]),
        (["search", "x", "--near", "1,2", "--index", "{index}"], 2, ["LAT,LON,KM"]),
        (["search", "x", "--json", "-0", "--index", "{index}"], 2, ["-0"]),
        (["search", "x", "--sheet", "/nowhere/x.png", "--index", "{index}"], 2, ["/nowhere/x.png"]),
        (["similar", "{tmp}/none.jpg", "--index", "{index}"], 2, ["none.jpg"]),
        (["similar", "123456789", "--index", "{index}"], 2, ["123456789"]),
        (["index", "{tmp}/none", "--index", "{tmp}/i"], 3, ["does not exist"]),
        (["index", "{index}/index.json", "--index", "{tmp}/i"], 3, ["not a folder"]),
        (["index"], 2, ["STORE"]),
        (["index", "{tmp}", "--index", "{tmp}/i", "--model", "nonesuch"], 4, ["nonesuch", "mini"]),
        (["index", "{tmp}", "--index", "{tmp}/i", "--batch-size", "0"], 2, ["batch_size"]),
        (["models", "import", "{tmp}/none"], 4, ["none"]),
        (["evaluate", "{tmp}/none.json", "--images", "{tmp}"], 2, ["none.json"]),
        (["train", "{tmp}/none.json", "--images", "{tmp}"], 2, ["none.json"]),
        (["nonesuch"], 2, ["nonesuch"]),
        (["search", "--nonesuch"], 2, ["nonesuch"]),
    ],
)
def test_wrong_use_gives_a_clear_message_and_the_promised_exit_code(
    cli: Cli, indexed: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    outcome = cli(*(a.format(index=indexed, tmp=tmp_path) for a in arguments))
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_a_query_of_more_words_than_are_read_is_refused(cli: Cli, indexed: Path) -> None:
    assert cli("search", "coffee " * 200, "-k", "1", "--index", indexed, "--json").code == 0
    outcome = cli("search", "coffee " * 10_000, "-k", "1", "--index", indexed, "--json")
    assert outcome.code == 2
    assert "more than the 256 tokens that mini reads; shorten it" in outcome.err


def test_an_empty_folder_makes_an_empty_index_that_finds_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = cli("index", tmp_path / "empty", "--index", tmp_path / "i", "--model", "mini")
    assert outcome.code == 0
    assert "no photos were found" in outcome.err
    found = cli("search", "anything", "--index", tmp_path / "i", "--json")
    assert (found.code, found.out) == (1, "")


def test_every_kind_of_bad_file_is_skipped_with_its_reason_and_good_names_survive(
    cli: Cli, library: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "truncated.jpg").write_bytes((library / "rocket.jpg").read_bytes()[:20_000])
    good = ["with space.png", "new\nline.png", "emoji \N{CAT FACE}.png", os.fsdecode(b"bytes \xff\xfe.png")]
    for shade, name in enumerate(good):
        Image.new("RGB", (40 + shade, 30), (shade * 60, 90, 20)).save(folder / name)
    Image.effect_noise((5477, 3652), 40).convert("RGB").save(folder / "20 megapixels.jpg", quality=50)
    report = json.loads(cli("index", folder, "--index", tmp_path / "i", "--model", "mini", "--json").out)
    assert (report["added"], report["failed"]) == (5, 3)
    failures = {os.path.basename(f["path"]): f["reason"] for f in cli(
        "status", "--failures", "--index", tmp_path / "i", "--json").lines}  # fmt: skip
    assert failures.keys() == {"text.jpg", "empty.png", "truncated.jpg"}
    assert "empty" in failures["empty.png"]
    found = cli("search", "a picture", "--index", tmp_path / "i", "--json")
    assert {os.path.basename(hit["path"]) for hit in found.lines} == {*good, "20 megapixels.jpg"}
    table = cli("search", "a picture", "--index", tmp_path / "i")
    assert "new\\nline.png" in table.out
    assert "bytes \\xff\\xfe.png" in table.out


def test_paths_come_out_as_the_very_bytes_of_their_names(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos")
    os.mkdir(folder)
    name = folder + b"/odd \xff name\n.png"
    with open(name, "wb") as file:
        Image.new("RGB", (30, 30), "red").save(file, "PNG")
    searchengine = [sys.executable, "-m", "searchengine"]
    subprocess.run([*searchengine, "index", folder, "--index", tmp_path / "i", "--model", "mini"], check=True, cwd=ROOT)
    query = ["search", "red", "-0", "--threshold", "none", "--index", str(tmp_path / "i")]
    found = subprocess.run([*searchengine, *query], check=True, capture_output=True, cwd=ROOT)
    assert found.stdout == name + b"\0"


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "termination"])
def test_an_interrupted_run_commits_says_so_and_the_next_one_goes_on(
    data: Path, tmp_path: Path, request_to_end: signal.Signals
) -> None:
    photos = data / "flickr8k_dev" / "images"
    run = [sys.executable, "-m", "searchengine", "index", photos, "--index", tmp_path / "i", "--model", "mini"]
    ours, theirs = pty.openpty()  # a terminal, so that the bar tells when photos are under way
    process = subprocess.Popen(run, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while not re.search(rb"indexing \[#", seen):
        seen += os.read(ours, 4096)
    process.send_signal(request_to_end)
    with contextlib.suppress(OSError):  # a terminal whose other side is closed reads as an error
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    assert process.wait(timeout=60) == 130, seen
    assert b"Traceback" not in seen
    assert b"run again to go on" in seen
    status = [sys.executable, "-m", "searchengine", "status", "--index", tmp_path / "i", "--json"]
    done = subprocess.run(status, check=True, capture_output=True, cwd=ROOT)
    committed = json.loads(done.stdout)["images"]
    again = subprocess.run([*run, "--dry-run", "--json"], check=True, capture_output=True, cwd=ROOT)
    left = json.loads(again.stdout)
    assert 0 < committed < left["scanned"]
    assert (left["unchanged"], left["added"]) == (committed, left["scanned"] - committed)


class _TerminatedWhileWriting(io.RawIOBase):
    """A pipe in whose first write the process is asked to terminate."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.asked = descriptor, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        if not self.asked:
            self.asked = True
            signal.raise_signal(signal.SIGTERM)
        return os.write(self.descriptor, data)


def test_a_request_to_end_may_come_in_the_middle_of_a_write_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    stream = io.TextIOWrapper(io.BufferedWriter(_TerminatedWhileWriting(theirs)), write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with ctrl_c_stops() as stop:
        stream.write("indexing")
        stream.flush()
    os.close(theirs)
    with open(ours, "rb") as pipe:
        assert pipe.read() == b"stopping after a commit; once more stops at once\nindexing"
    assert stop.is_set()


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli: Cli, command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0
    assert f"searchengine {command}" in shown.out
    assert "Example:" in shown.out
    assert "--json" in shown.out


def test_a_text_search_loads_no_torch(indexed: Path) -> None:
    code = (
        "import sys\nfrom searchengine.cli import main\n"
        f"sys.argv = ['searchengine', 'search', 'a cat', '--index', {str(indexed)!r}]\n"
        "try: main()\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT, text=True)
    assert done.stderr.split() == ["False", "False"]


# -- what an adversarial user found ----------------------------------------------------------------------------------


@pytest.fixture
def small(cli: Cli, library: Path, tmp_path: Path) -> Path:
    """A folder of two photos, indexed at `tmp_path / "i"`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("coffee.png", "chelsea.png"):
        shutil.copy(library / name, folder)
    assert cli("index", folder, "--index", tmp_path / "i", "--model", "mini").code == 0
    return folder


@pytest.mark.parametrize("damage", ["metadata.sqlite", "segments/00000001.faiss"])
def test_index_refuses_to_build_on_a_broken_index(cli: Cli, small: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "i" / damage).unlink()
    outcome = cli("index", small, "--index", tmp_path / "i")
    assert outcome.code == 3
    assert "index again" in outcome.err


def test_an_empty_store_name_is_not_the_current_folder(cli: Cli, small: Path, tmp_path: Path) -> None:
    assert cli("index", "", "--index", tmp_path / "i").code == 2


def test_a_file_that_is_no_model_leaves_no_index_behind(cli: Cli, small: Path, tmp_path: Path) -> None:
    outcome = cli("index", small, "--index", tmp_path / "j", "--model", small / "coffee.png")
    assert outcome.code == 4
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--sheet", "photos/coffee.png.jpg"), ("--html", "photos/coffee.png"), ("--threshold", "nan")],
)
def test_slips_of_the_hand_are_refused(cli: Cli, small: Path, tmp_path: Path, option: str, value: str) -> None:
    before = (small / "coffee.png").read_bytes()
    assert cli("search", "x", option, tmp_path / value, "--index", tmp_path / "i").code == 2
    assert (small / "coffee.png").read_bytes() == before


def test_a_device_that_does_not_exist_is_a_clear_error(cli: Cli, small: Path, tmp_path: Path) -> None:
    unknown = cli("index", small, "--index", tmp_path / "i", "--device", "quantum")
    assert (unknown.code, "quantum" in unknown.err) == (2, True)
    away = cli("index", small, "--index", tmp_path / "j", "--model", "mini", "--device", "cuda:63")
    assert (away.code, "--device cpu" in away.err, "internal" in away.err) == (4, True, False)


def test_training_on_a_device_that_is_not_here_is_a_clear_error(cli: Cli, library: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('[{"file": "coffee.png", "captions": ["coffee"]}]')
    outcome = cli("train", tmp_path / "captions.json", "--images", library, "--device", "cuda:63")
    assert (outcome.code, "--device cpu" in outcome.err, "internal" in outcome.err) == (4, True, False)


def test_an_id_beyond_all_ids_is_a_clear_error(cli: Cli, indexed: Path) -> None:
    outcome = cli("similar", "9" * 30, "--index", indexed)
    assert (outcome.code, "no photo with id" in outcome.err) == (2, True)


def test_previews_do_not_mix_with_output_for_programs(cli: Cli, indexed: Path) -> None:
    assert cli("search", "a cat", "--preview", "--json", "--index", indexed).code == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_crash(indexed: Path, closed: str) -> None:
    command = f"{sys.executable} -m searchengine search 'a cat' --json --index {indexed} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_the_output_is_a_clear_error(indexed: Path) -> None:
    command = f"{sys.executable} -m searchengine search 'a cat' --json --index {indexed} > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_the_messages_ends_nothing(indexed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    painted(1).save(folder / "a.png")
    (folder / "broken.jpg").write_text("this is no picture")
    command = f"exec {sys.executable} -m searchengine"
    full = {"shell": True, "cwd": ROOT}
    assert subprocess.run(f"{command} verify --index {tmp_path}/none 2>/dev/full", **full).returncode == 3
    made = f"{command} index {folder} --index {tmp_path}/i --model mini --json 2>/dev/full"
    done = subprocess.run(made, **full, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["added"], json.loads(done.stdout)["failed"]) == (0, 1, 1)


def test_vectors_that_rotted_on_disk_are_told_not_shown_as_nan(cli: Cli, small: Path, tmp_path: Path) -> None:
    segment = tmp_path / "i" / "segments" / "00000001.faiss"
    content = bytearray(segment.read_bytes())
    content[1000:1004] = b"\xff\xff\xff\x7f"
    segment.write_bytes(content)
    outcome = cli("search", "a cat", "--index", tmp_path / "i", "--json")
    assert (outcome.code, outcome.out) == (3, "")
    assert "index again" in outcome.err
