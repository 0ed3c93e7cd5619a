"""Names -> encoders: which there are, how weights come in, and what `--model auto` and `--precision` choose."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from fakes import FakeEncoder
from safetensors.numpy import save_file
from test_download import CONTENT, OTHER, Server, published_at, running, serve, stall, status

import searchengine
from indexer.writable import identity_of
from searchengine.cli.options import encoder_for, settings_from
from searchengine.errors import ModelNotFound, UsageError, WeightsError
from searchengine.index.layout import PRECISIONS, read_identity, write_identity
from searchengine.models import download as downloading
from searchengine.models.mini import parts
from searchengine.models.published import PREFERRED, PUBLISHED, PublishedFile
from searchengine.models.registry import find_weights, import_model, list_models, load_encoder
from searchengine.vectors import Encoder

ROOT = Path(__file__).parent.parent
Paint = Callable[..., Path]


@pytest.fixture(autouse=True)
def environment(own_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a proxy, or waits long before it tries again."""
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SEARCHENGINE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(downloading, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def tiny(server: Server, monkeypatch: pytest.MonkeyPatch) -> PublishedFile:
    """In place of CLIP ViT-B/32: a file of 100 kB that the server on loopback has."""
    file = replace(published_at(server.url), name=PREFERRED, architecture="ViT-B/32")
    monkeypatch.setitem(PUBLISHED, PREFERRED, file)
    return file


class FakeClip(FakeEncoder):
    """Stands for ClipEncoder, which is tested elsewhere: what matters here is how it is called."""

    def __init__(
        self,
        *,
        name: str,
        weights_file: Path,
        device: str = "auto",
        precision: str = "fp32",
        sha256: str | None = None,
        hashes_folder: Path | None = None,
    ) -> None:
        super().__init__(name=name)
        self.weights_file, self.device, self.precision, self.sha256 = weights_file, device, precision, sha256
        self.fingerprint = hashlib.sha256(weights_file.read_bytes() + precision.encode()).hexdigest()
        opened.append((name, device, precision))


opened: list[tuple[str, str, str]] = []


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """(name, device, precision) of each CLIP that was loaded."""
    module = types.ModuleType("searchengine.models.clip.encoder")
    module.ClipEncoder = FakeClip  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    opened.clear()
    return opened


def in_a_process(file: PublishedFile, arguments: list[str]) -> str:
    """The command line as a program of its own, in which `file` is what CLIP ViT-B/32 stands for."""
    return (
        "import sys\nfrom searchengine.cli import main\n"
        "from searchengine.models.published import PUBLISHED, PublishedFile\n"
        f"PUBLISHED[{PREFERRED!r}] = {file!r}\nsys.argv = ['searchengine', *{arguments!r}]\nmain()\n"
    )


def state_dict(*, width: int = 64, layers: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """The smallest CLIP: OpenAI's names, patches of 16 pixels, pictures of 32."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (77, width),
        "text_projection": (width, 8),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (5, width),
        "visual.proj": (width, 8),
        "visual.conv1.weight": (width, 3, 16, 16),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
    }
    for tower in ("transformer", "visual.transformer"):
        for block in (f"{tower}.resblocks.{number}" for number in range(layers)):
            for part, out, inputs in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                shapes |= {f"{block}.{part}weight": (out, inputs), f"{block}.{part}bias": (out,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


def tell_activation(beside: Path, *, quick_gelu: bool, head_width: int = 64) -> None:
    vision = {"width": 64, "head_width": head_width}
    config = {"model_cfg": {"quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 1}}}
    (beside.parent / "open_clip_config.json").write_text(json.dumps(config))


# -- the list, downloads, names --------------------------------------------------------------------------------------


def test_the_list_has_mini_and_each_published_clip_with_its_dimension_and_hash(cli: Cli) -> None:
    lines = cli("models", "--json").lines
    assert [(line["name"], line["dim"], line["downloaded"]) for line in lines] == [
        ("mini", 512, True),
        ("clip-vit-b-32", 512, False),
        ("clip-vit-b-16", 512, False),
        ("clip-vit-l-14", 768, False),
        ("clip-vit-l-14-336", 768, False),
    ]
    for line in lines:
        assert list(line) == ["name", "dim", "size_bytes", "downloaded", "licence", "about", "url", "sha256"]
    for line in lines[1:]:
        assert line["licence"] == "MIT"
        assert line["sha256"] in line["url"]
    table = cli("models").out.splitlines()
    assert len(table) == 5
    assert "890 MiB  not here" in table[3]


def test_a_download_is_told_with_its_size_and_done_once(cli: Cli, server: Server, tiny: PublishedFile) -> None:
    first = cli("models", "download", PREFERRED, "--json")
    assert (first.code, first.lines[0]["downloaded"], len(server.paths)) == (0, True, 1)
    assert f"downloading the encoder {PREFERRED}: 0 MiB" in first.err
    again = cli("models", "download", PREFERRED, "--json")
    assert (again.out, again.err, len(server.paths)) == (first.out, "", 1)
    assert [line["downloaded"] for line in cli("models", "--json").lines[:3]] == [True, True, False]


def test_a_download_draws_a_bar_on_a_terminal(server: Server, folder: Path) -> None:
    content = random.Random(2).randbytes(3 * 2**20)
    server.script = [serve(content, until=len(content))]
    file = replace(
        published_at(server.url),
        name=PREFERRED,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )
    code = in_a_process(file, ["models", "download", PREFERRED])
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    with suppress(OSError):
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    assert process.wait(timeout=20) == 0, seen
    assert b"downloading the encoder clip-vit-b-32: 3 MiB" in seen
    assert b"downloading clip-vit-b-32, MiB [" in seen
    assert b"3/3" in seen


@pytest.mark.parametrize("arguments", [["nonesuch"], ["../mini"], [""]])
def test_an_unknown_name_cannot_be_downloaded(cli: Cli, arguments: list[str]) -> None:
    outcome = cli("models", "download", *arguments)
    assert (outcome.code, outcome.out, "searchengine models" in outcome.err) == (4, "", True)


def test_what_cannot_be_downloaded_is_told_with_the_way_by_hand(
    cli: Cli, server: Server, tiny: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [status(404)]
    outcome = cli("models", "download", PREFERRED)
    assert (outcome.code, outcome.out) == (4, "")
    assert "searchengine models import FILE" in outcome.err
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")
    outcome = cli("models", "download", PREFERRED)
    assert (outcome.code, "offline" in outcome.err, len(server.paths)) == (4, True, 1)


def test_the_mirror_that_is_set_is_asked_first(
    cli: Cli, server: Server, tiny: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_MIRROR", server.url + "/mirror")
    assert cli("models", "download", PREFERRED).code == 0
    assert server.paths == ["/mirror/tiny.pt"]


def test_loading_a_clip_that_is_not_here_names_the_command_and_fetches_nothing(
    server: Server, tiny: PublishedFile, folder: Path
) -> None:
    for load in (lambda: load_encoder(PREFERRED, models_folder=folder), lambda: searchengine.load_encoder(PREFERRED)):
        with pytest.raises(ModelNotFound, match=f"searchengine models download {PREFERRED}$"):
            load()
    assert server.paths == []


def test_a_clip_is_loaded_as_it_was_asked_for(
    tiny: PublishedFile, folder: Path, clips: list[tuple[str, str, str]]
) -> None:
    folder.mkdir()
    tiny.stored_in(folder).write_bytes(CONTENT)
    encoder = load_encoder(PREFERRED, device="cpu", precision="bf16", models_folder=folder)
    assert isinstance(encoder, FakeClip)
    assert (encoder.weights_file, clips) == (folder / f"{PREFERRED}.pt", [(PREFERRED, "cpu", "bf16")])
    by_path = load_encoder(str(folder / f"{PREFERRED}.pt"), models_folder=folder)
    assert isinstance(by_path, FakeClip)
    assert (encoder.sha256, by_path.sha256) == (tiny.sha256, None)


def test_half_a_file_under_the_final_name_counts_as_missing(tiny: PublishedFile, folder: Path) -> None:
    folder.mkdir()
    tiny.stored_in(folder).write_bytes(CONTENT[:-1])
    with pytest.raises(ModelNotFound, match="models download"):
        find_weights(PREFERRED, models_folder=folder)
    assert not next(info for info in list_models(folder) if info.name == PREFERRED).downloaded


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p not in parts.PRECISIONS])
def test_mini_has_two_precisions(precision: str) -> None:
    with pytest.raises(UsageError, match=f"mini has no precision {precision}; use --precision fp32 or int8"):
        load_encoder("mini", precision=precision)


def test_each_precision_of_mini_has_a_fingerprint_of_its_own_and_indexes_that_were_made_keep_theirs() -> None:
    fingerprints = {precision: load_encoder("mini", precision=precision).fingerprint for precision in parts.PRECISIONS}
    assert {name: value[:12] for name, value in fingerprints.items()} == {
        "fp32": "e36d8d4ec9fa",
        "int8": "f680b149c7fe",
    }


def test_an_unknown_name_is_told_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no encoder nonesuch; use one of mini, clip-vit-b-32, .*the path"):
        load_encoder("nonesuch", models_folder=folder)


# -- imports ---------------------------------------------------------------------------------------------------------


def test_published_bytes_are_recognised_under_any_name(tiny: PublishedFile, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "weights (1).bin").write_bytes(CONTENT)
    info = import_model(tmp_path / "weights (1).bin", models_folder=folder)
    assert (info.name, info.downloaded, info.sha256) == (PREFERRED, True, tiny.sha256)
    assert find_weights(PREFERRED, models_folder=folder).read_bytes() == CONTENT


def test_heads_are_kept_under_their_stem(tmp_path: Path, folder: Path, cli: Cli) -> None:
    shutil.copy(parts.SHIPPED_HEADS, tmp_path / "mine.safetensors")
    assert cli("models", "import", tmp_path / "mine.safetensors", "--json").lines[0]["name"] == "mine"
    encoder = load_encoder("mine", models_folder=folder)
    assert (encoder.name, encoder.fingerprint) == ("mine", load_encoder("mini").fingerprint)


@pytest.mark.parametrize(("quick_gelu", "stem"), [(True, "model-quickgelu"), (False, "model-gelu")])
def test_a_clip_takes_the_activation_that_was_told_beside_it_into_its_name(
    tmp_path: Path, folder: Path, quick_gelu: bool, stem: str
) -> None:
    from searchengine.models.clip.checkpoints import Checkpoint

    original = tmp_path / "publisher" / "model.safetensors"
    original.parent.mkdir()
    save_file(state_dict(), original)
    tell_activation(original, quick_gelu=quick_gelu)
    info = import_model(original, models_folder=folder)
    assert (info.name, info.dim, info.downloaded) == (stem, 8, True)
    copy = Checkpoint(folder / f"{stem}.safetensors")
    assert copy.config == Checkpoint(original).config
    assert list(folder.iterdir()) == [copy.path]
    assert find_weights(stem, models_folder=folder) == copy.path


def test_a_clip_whose_name_tells_its_activation_keeps_it(tmp_path: Path, folder: Path) -> None:
    save_file(state_dict(), tmp_path / "mine-quickgelu.safetensors")
    assert import_model(tmp_path / "mine-quickgelu.safetensors", models_folder=folder).name == "mine-quickgelu"


def test_a_clip_that_cannot_stand_alone_is_not_copied(tmp_path: Path, folder: Path) -> None:
    original = tmp_path / "model.safetensors"
    save_file(state_dict(), original)
    tell_activation(original, quick_gelu=True, head_width=32)
    with pytest.raises(WeightsError, match=r"use it where it is, with: --model \S+model\.safetensors"):
        import_model(original, models_folder=folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"this is no checkpoint", OTHER, b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_model_is_refused_and_not_kept(
    cli: Cli, tmp_path: Path, folder: Path, content: bytes
) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    outcome = cli("models", "import", tmp_path / "x.pt")
    assert (outcome.code, "x.pt" in outcome.err, "internal" in outcome.err) == (4, True, False)
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["mini", PREFERRED])
def test_a_built_in_name_cannot_be_taken(tmp_path: Path, folder: Path, name: str) -> None:
    shutil.copy(parts.SHIPPED_HEADS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelNotFound, match=f"the name {name} is taken"):
        import_model(tmp_path / f"{name}.safetensors", models_folder=folder)


def test_one_name_is_never_two_files(tmp_path: Path, folder: Path) -> None:
    shutil.copy(parts.SHIPPED_HEADS, tmp_path / "a.safetensors")
    import_model(tmp_path / "a.safetensors", models_folder=folder)
    import_model(tmp_path / "a.safetensors", models_folder=folder)
    (folder / "a.safetensors").rename(folder / "a.pt")
    with pytest.raises(ModelNotFound, match="the name a is taken by another encoder"):
        import_model(tmp_path / "a.safetensors", models_folder=folder)


def test_an_imported_file_that_rotted_is_listed_as_such(cli: Cli, folder: Path) -> None:
    folder.mkdir()
    (folder / "rotten.pt").write_bytes(OTHER)
    (folder / f"{PREFERRED}.pt.part").write_bytes(OTHER)
    lines = cli("models", "--json").lines
    assert [(line["name"], line["downloaded"]) for line in lines[5:]] == [("rotten", False)]
    assert "rotten.pt" in lines[5]["about"]


# -- --model auto ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(paint: Paint) -> Path:
    return paint("photos/a.png").parent


def test_auto_takes_the_clip_that_is_here_and_asks_nobody(
    cli: Cli, server: Server, tiny: PublishedFile, folder: Path, pictures: Path, clips: list[tuple[str, str, str]]
) -> None:
    folder.mkdir()
    tiny.stored_in(folder).write_bytes(CONTENT)
    outcome = cli("index", pictures, "--index", folder / "i", "--json")
    assert outcome.lines[0]["model"] == PREFERRED
    assert server.paths == []


def test_auto_downloads_the_clip_that_is_on_offer_and_says_so(
    cli: Cli, server: Server, tiny: PublishedFile, folder: Path, pictures: Path, clips: list[tuple[str, str, str]]
) -> None:
    outcome = cli("index", pictures, "--index", folder / "i", "--json")
    assert (outcome.code, outcome.lines[0]["model"]) == (0, PREFERRED)
    assert f"downloading the encoder {PREFERRED}: 0 MiB" in outcome.err
    assert tiny.is_in(folder)
    assert len(server.paths) == 2, "one request to see, one to fetch"


def test_a_dry_run_downloads_nothing(cli: Cli, server: Server, tiny: PublishedFile, folder: Path) -> None:
    folder.mkdir()
    outcome = cli("index", folder, "--index", folder / "i", "--dry-run", "--json")
    assert outcome.lines[0]["model"] == PREFERRED
    assert server.ranges == ["bytes=0-0"]
    asked = cli("index", folder, "--index", folder / "i", "--dry-run", "--json", "--model", "clip-vit-l-14")
    assert asked.lines[0]["model"] == "clip-vit-l-14"
    assert list(folder.iterdir()) == []


def test_auto_falls_back_to_mini_and_says_how_to_get_clip(
    cli: Cli, server: Server, tiny: PublishedFile, pictures: Path
) -> None:
    server.script = [status(404)]
    outcome = cli("index", pictures, "--index", pictures / "i", "--dry-run", "--json")
    assert (outcome.code, outcome.lines[0]["model"]) == (0, "mini")
    assert f"searchengine models download {PREFERRED}" in outcome.err


def test_auto_takes_mini_where_the_download_breaks(
    cli: Cli, server: Server, tiny: PublishedFile, pictures: Path, tmp_path: Path
) -> None:
    server.script = [serve(), serve(until=50_000), status(404)]
    outcome = cli("index", pictures, "--index", tmp_path / "i", "--json")
    assert (outcome.code, outcome.lines[0]["model"]) == (0, "mini")
    assert "cannot be downloaded" in outcome.err
    assert read_identity(tmp_path / "i").encoder == "mini"


def test_auto_asks_nobody_when_offline(
    cli: Cli, server: Server, tiny: PublishedFile, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")
    outcome = cli("index", pictures, "--index", pictures / "i", "--dry-run", "--json")
    assert outcome.lines[0]["model"] == "mini"
    assert "offline" in outcome.err
    assert server.paths == []


def test_auto_is_decided_within_five_seconds_when_the_network_stalls(server: Server, pictures: Path) -> None:
    server.script = [stall()]
    file = replace(published_at(server.url), name=PREFERRED)
    code = in_a_process(file, ["index", str(pictures), "--index", str(pictures / "i"), "--dry-run"])
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - started < 5
    assert (done.returncode, "taking the encoder mini" in done.stderr) == (0, True)


def test_auto_is_the_indexs_own_encoder_whatever_else_there_is(
    cli: Cli, server: Server, tiny: PublishedFile, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    assert cli("index", pictures, "--index", tmp_path / "i", "--model", "mini").code == 0
    folder.mkdir(exist_ok=True)  # mini may have left its hashes there
    tiny.stored_in(folder).write_bytes(CONTENT)
    assert cli("index", pictures, "--index", tmp_path / "i", "--json").lines[0]["model"] == "mini"
    assert server.paths == []


def test_a_search_downloads_nothing_and_names_the_command(
    cli: Cli, server: Server, tiny: PublishedFile, folder: Path, pictures: Path, clips: list[tuple[str, str, str]]
) -> None:
    assert cli("index", pictures, "--index", folder / "i", "--model", PREFERRED).code == 0
    assert cli("search", "a", "--index", folder / "i").code == 0
    tiny.stored_in(folder).unlink()
    asked = len(server.paths)
    outcome = cli("search", "a", "--index", folder / "i")
    assert (outcome.code, f"searchengine models download {PREFERRED}" in outcome.err) == (4, True)
    assert len(server.paths) == asked
    assert cli("index", pictures, "--index", folder / "i").code == 0, "the index needs its own encoder"
    assert len(server.paths) == asked + 1


def test_no_weights_are_fetched_for_an_index_that_another_encoder_made(
    cli: Cli, server: Server, tiny: PublishedFile, pictures: Path, tmp_path: Path
) -> None:
    assert cli("index", pictures, "--index", tmp_path / "i", "--model", "mini").code == 0
    outcome = cli("index", pictures, "--index", tmp_path / "i", "--model", PREFERRED)
    assert (outcome.code, "made by encoder mini" in outcome.err) == (4, True)
    assert server.paths == []


# -- --precision -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_int8(
    cli: Cli, tiny: PublishedFile, folder: Path, pictures: Path, clips: list[tuple[str, str, str]], tmp_path: Path
) -> Path:
    """An index that was made with --precision int8."""
    outcome = cli("index", pictures, "--index", tmp_path / "i", "--model", PREFERRED, "--precision", "int8")
    assert outcome.code == 0, outcome.err
    clips.clear()
    return tmp_path / "i"


def test_an_index_remembers_its_precision_and_opens_with_it(
    cli: Cli, in_int8: Path, pictures: Path, clips: list[tuple[str, str, str]]
) -> None:
    assert read_identity(in_int8).precision == "int8"
    assert cli("search", "a", "--index", in_int8).code == 0
    assert cli("similar", pictures / "a.png", "--index", in_int8).code == 1
    assert cli("index", pictures, "--index", in_int8).code == 0
    assert cli("index", pictures, "--index", in_int8, "--model", PREFERRED).code == 0
    assert [precision for _, _, precision in clips] == ["int8"] * 4


def test_the_setting_is_for_new_indexes(
    cli: Cli, in_int8: Path, pictures: Path, clips: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_PRECISION", "bf16")
    assert cli("index", pictures, "--index", in_int8).code == 0
    assert cli("index", pictures, "--index", in_int8.with_name("j")).code == 0
    assert [precision for _, _, precision in clips] == ["int8", "bf16"]
    assert cli("index", pictures, "--index", in_int8.with_name("k"), "--model", "mini").code == 0
    assert read_identity(in_int8.with_name("k")).precision == "fp32"


def test_another_precision_than_the_indexs_is_refused_with_a_remedy(cli: Cli, in_int8: Path, pictures: Path) -> None:
    outcome = cli("index", pictures, "--index", in_int8, "--precision", "fp32")
    assert (outcome.code, "use --precision int8" in outcome.err) == (4, True)
    assert read_identity(in_int8).precision == "int8"


def test_mini_in_another_precision_is_wrong_use(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    outcome = cli("index", pictures, "--index", tmp_path / "i", "--model", "mini", "--precision", "bf16")
    assert (outcome.code, "fp32 or int8" in outcome.err) == (2, True)
    assert not (tmp_path / "i").exists()


def test_an_index_of_mini_in_int8_is_made_searched_and_embedded_anew(
    cli: Cli, paint: Paint, pictures: Path, tmp_path: Path
) -> None:
    paint("photos/b.bmp")
    index, mini = tmp_path / "i", ("--model", "mini", "--json")
    made = cli("index", pictures, "--index", index, *mini, "--precision", "int8", "--device", "cpu")
    assert (made.code, made.lines[0]["failed"]) == (0, 0), made.err
    (status,) = cli("status", "--index", index, "--json").lines
    assert (status["precision"], status["vectors"]) == ("int8", status["images"])
    found = cli("similar", pictures / "a.png", "--index", index, "--json")
    assert (found.code, found.lines[0]["path"]) == (0, str(pictures / "b.bmp")), found.err
    assert found.lines[0]["score"] > 0.999
    assert cli("search", "blocks of colour", "--index", index, "-k", "2").code == 0
    assert cli("index", pictures, "--index", index, *mini).lines[0]["unchanged"] == status["images"]
    refused = cli("index", pictures, "--index", index, *mini, "--precision", "fp32")
    assert (refused.code, "use --precision int8" in refused.err) == (4, True)
    kept = cli("reencode", "--index", index, "--model", "mini")
    assert (kept.code, "nothing to do: the index is of the encoder mini in int8" in kept.out) == (0, True)
    remedy = refused.err.split("searchengine reencode ")[1].split()
    changed = cli("reencode", "--index", index, *remedy)
    assert (changed.code, "is of the encoder mini in fp32 now" in changed.out) == (0, True)
    (status,) = cli("status", "--index", index, "--json").lines
    assert (status["precision"], status["vectors"]) == ("fp32", status["images"])


@pytest.mark.parametrize(("wanted", "taken"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("int8", "int8")])
def test_heads_for_mini_take_the_setting_that_mini_takes(
    wanted: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = shutil.copy(parts.SHIPPED_HEADS, tmp_path / "mine.safetensors")
    monkeypatch.setenv("SEARCHENGINE_PRECISION", wanted)
    for model in ("mini", str(heads)):
        assert encoder_for(settings_from(index=str(tmp_path / "i"), model=model)).precision == taken


def test_what_is_trained_does_not_depend_on_what_an_index_or_the_settings_say(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "i").mkdir()
    encoder = load_encoder("mini", precision="int8")
    write_identity(tmp_path / "i", identity_of(encoder))
    (tmp_path / "captions.json").write_text('[{"file": "a.png", "captions": ["blocks"]}]')
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(tmp_path / "i"))
    monkeypatch.setenv("SEARCHENGINE_PRECISION", "int8")
    trained: list[str] = []

    def note(photos: object, *, encoder: Encoder, **options: object) -> None:
        trained.append(encoder.precision)
        raise UsageError("enough")

    monkeypatch.setattr("indexer.train.train", note)
    run = ["train", tmp_path / "captions.json", "--images", tmp_path, "--out", tmp_path / "mine.safetensors"]
    assert cli(*run).code == cli(*run, "--precision", "int8").code == 2
    assert trained == ["fp32", "int8"]


def test_evaluate_takes_a_precision_of_its_own(
    cli: Cli, in_int8: Path, pictures: Path, clips: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "captions.json").write_text('[{"file": "a.png", "captions": ["blocks"]}]')
    run = ["evaluate", tmp_path / "captions.json", "--images", pictures, "--index", in_int8, "--json"]
    assert cli(*run).code == 0
    assert cli(*run, "--precision", "bf16").code == 0
    assert [precision for _, _, precision in clips] == ["int8", "bf16"]


@pytest.mark.parametrize("precision", ["fp64", "", None, 8, ["fp32"]])
def test_an_index_of_unknown_precision_is_refused(cli: Cli, in_int8: Path, precision: object) -> None:
    card = in_int8 / "index.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"precision": precision}))
    outcome = cli("search", "a", "--index", in_int8)
    assert (outcome.code, "unknown precision" in outcome.err) == (3, True)


def test_an_index_from_before_precisions_is_in_fp32(cli: Cli, in_int8: Path) -> None:
    card = in_int8 / "index.json"
    fields = json.loads(card.read_text())
    del fields["precision"], fields["checksum"]
    card.write_text(json.dumps(fields))
    assert read_identity(in_int8).precision == "fp32"
