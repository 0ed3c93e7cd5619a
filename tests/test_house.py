"""The house's own rules: which room may know which, what is loaded when, and what no room may do."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from searchengine import errors

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("searchengine", "indexer") for file in (ROOT / package).rglob("*.py"))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield ast.unparse(node.args[0]).strip("f'\"")


def at_module_level(tree: ast.Module) -> Iterator[str]:
    """What is imported as soon as the module is; for the checker of types alone, nothing is."""
    for node in tree.body:
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from imports(node)


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_arrows_run_from_the_indexer_to_the_library_and_never_back(file: Path) -> None:
    tree = tree_of(file)
    if file.is_relative_to(ROOT / "indexer"):
        assert not [module for module in imports(tree) if module.split(".")[:2] == ["searchengine", "cli"]]
    elif file.is_relative_to(ROOT / "searchengine" / "cli"):
        assert not [module for module in at_module_level(tree) if module.split(".")[0] == "indexer"]
    else:
        assert not [module for module in imports(tree) if module.split(".")[0] == "indexer"]
        above = [module for module in imports(tree) if module.split(".")[:2] == ["searchengine", "cli"]]
        assert not above or file.name == "__main__.py"


def is_library(file: Path) -> bool:
    """Neither the command line, nor the program that decodes in a process of its own."""
    return not file.is_relative_to(ROOT / "searchengine" / "cli") and file.name != "decoder_process.py"


@pytest.mark.parametrize("file", [file for file in SOURCES if is_library(file)], ids=name)
def test_no_room_but_the_programs_prints_or_exits(file: Path) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
    assert not {"print", "input", "exit", "quit", "sys.exit", "os._exit", "click.echo"} & set(calls)
    raised = [ast.unparse(node.exc) for node in ast.walk(tree_of(file)) if isinstance(node, ast.Raise) and node.exc]
    assert not [what for what in raised if what.startswith("SystemExit")]


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh process has loaded when `code` is done, however it ends."""
    script = f"import atexit, json, sys\natexit.register(lambda: print(json.dumps(list(sys.modules))))\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {module.split(".")[0] for module in json.loads(done.stdout.splitlines()[-1])}


EXTRAS = {
    *("adlfs", "aiobotocore", "aiohttp", "asyncssh", "botocore", "fsspec", "s3fs"),
    *("grpc", "milvus_lite", "pyarrow", "pymilvus", "ray"),
}
HEAVY = {"torch", "faiss", "sqlalchemy", "numpy", "PIL"} | EXTRAS


@pytest.mark.parametrize("package", ["searchengine", "indexer", "searchengine.cli"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert not loaded_by(f"import {package}") & HEAVY


WITHOUT_EXTRAS = """
import sys
from pathlib import Path

for name in {extras!r}:
    sys.modules[name] = None  # as good as not installed
sys.path.insert(0, "tests")

import indexer
import searchengine
from conftest import painted
from fakes import FakeEncoder

folder = Path({folder!r})
painted(1).save(folder / "1.png")
indexer.build(folder / "new.index", [folder], encoder=FakeEncoder())
with searchengine.open_index(folder / "new.index") as index:
    assert len(searchengine.Searcher(index, FakeEncoder()).search("a photo")) == 1
"""


def test_a_folder_is_indexed_and_searched_without_any_extra(tmp_path: Path) -> None:
    code = WITHOUT_EXTRAS.format(extras=sorted(EXTRAS - {"fsspec"}), folder=str(tmp_path))  # torch brings fsspec
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_asking_for_help_loads_nothing_heavy(arguments: list[str]) -> None:
    run = "import runpy\nrunpy.run_module('searchengine', run_name='__main__')"
    assert not loaded_by(f"sys.argv = ['searchengine', *{arguments!r}]\n{run}") & HEAVY


def test_help_comes_at_once() -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "searchengine", "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.monotonic() - started)
    assert min(times) < 0.3


def test_the_public_names_are_these() -> None:
    import indexer
    import searchengine

    assert searchengine.__all__ == ["Filters", "Hit", "Searcher", "errors", "load_encoder", "open_index"]
    assert indexer.__all__ == ["Report", "build", "staged"]
    for package in (searchengine, indexer):
        assert all(getattr(package, public) is not None for public in package.__all__)
        with pytest.raises(AttributeError):
            package.no_such_name  # noqa: B018


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_has_its_place_in_the_tree_and_its_exit_code() -> None:
    drawing = errors.__doc__ or ""
    assert ERRORS
    for kind in ERRORS:
        assert issubclass(kind, errors.SearchEngineError)
        assert kind.exit_code in {2, 3, 4}
        assert f" {kind.__name__} " in drawing.replace("\n", " \n"), f"{kind.__name__} is missing from the drawing"
    drawn = {
        word
        for word in drawing.split()
        if word.endswith(("Error", "Unusable", "NotFound", "Locked", "Mismatch", "TooNew"))
    }
    assert drawn == {kind.__name__ for kind in ERRORS}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_exits_as_the_drawing_says(kind: type[errors.SearchEngineError]) -> None:
    if issubclass(kind, errors.UsageError):
        assert kind.exit_code == 2
    elif issubclass(kind, errors.ModelUnusable):
        assert kind.exit_code == 4
    else:
        assert kind.exit_code == 3
