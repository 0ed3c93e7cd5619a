"""What the documents say is so: commands, flags, files, the Python example."""

from __future__ import annotations

import keyword
import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from searchengine.cli import COMMANDS, group
from searchengine.settings import NAMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def command_lines() -> list[str]:
    """All that the documents tell people to type, each once."""
    blocks = [
        block for file in DOCUMENTS for block in re.findall(r"```sh\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
    ]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("searchengine ")]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_in_the_documents_is_understood(line: str) -> None:
    words = shlex.split(line.split("|")[0], comments=True)
    command = group.get_command(click.Context(group), words[1])
    assert command is not None
    with click.Context(command, info_name=words[1]) as context:
        command.parse_args(context, words[2:])


def test_every_command_is_in_the_readme_and_none_that_does_not_exist() -> None:
    table = set(re.findall(r"^\| `([a-z]+)[ `]", README, re.MULTILINE))
    assert table == set(COMMANDS)


def test_the_scripts_that_the_readme_names_are_there_and_can_be_run() -> None:
    for name in set(re.findall(r"scripts/([a-z_0-9]+(?:\.py)?)", README)):
        script = ROOT / "scripts" / name
        assert script.is_file(), name
        assert script.suffix == ".py" or script.stat().st_mode & 0o111, name


def test_every_file_that_the_documents_link_to_is_there() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
            assert (document.parent / target).is_file(), (document.name, target)


def test_the_architecture_names_every_module_and_none_that_is_gone() -> None:
    rooms = ARCHITECTURE.split("## Rooms")[1].split("\n## ")[0]
    named = set(re.findall(r"([a-z_0-9]+)\.py", rooms))
    modules = {path.stem for room in ("searchengine", "indexer") for path in (ROOT / room).rglob("*.py")}
    # The table names them together: one short module a command.
    commands = {f"{name}_" if keyword.iskeyword(name) else name for name in COMMANDS}
    assert named <= modules
    assert modules - named - commands - {"__init__", "__main__"} == set()


def test_the_extras_that_messages_and_documents_name_are_those_there_are() -> None:
    sources = [*DOCUMENTS, *(file for room in ("searchengine", "indexer") for file in (ROOT / room).rglob("*.py"))]
    named = {name for file in sources for name in re.findall(r"searchengine\[([a-z0-9]+)\]", file.read_text("utf-8"))}
    assert named <= set(PROJECT["optional-dependencies"])
    told = README + (ROOT / "docs" / "stores.md").read_text("utf-8")
    of_people = set(PROJECT["optional-dependencies"]) - {"bench", "demo", "dev"}
    assert {name for name in of_people if f"`{name}`" in told or f"[{name}]" in told} == of_people


def test_ci_installs_every_extra_that_the_tests_can_use() -> None:
    """What is not installed there would be skipped, or fail only where people have it."""
    own = re.compile(r"searchengine\[(.*)\]")
    [brought] = [match[1].split(",") for name in PROJECT["optional-dependencies"]["dev"] if (match := own.match(name))]
    [everything] = [
        match[1].split(",") for name in PROJECT["optional-dependencies"]["all"] if (match := own.match(name))
    ]
    assert set(everything) - set(brought) == {"azure"}  # of which there is no server to test against


def test_the_default_settings_are_those_that_the_program_knows() -> None:
    defaults = tomllib.loads((ROOT / "config" / "default.toml").read_text("utf-8"))
    assert set(defaults) == set(NAMES)


@pytest.mark.skipif(
    find_spec("skimage") is None, reason="needs the extra `demo`: pip install scikit-image scikit-learn"
)
def test_the_python_example_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    pictures = tmp_path / "Pictures"
    pictures.mkdir()
    shutil.copy(Path(spec.submodule_search_locations[0], "data", "coffee.png"), pictures)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    rank, _, path = capsys.readouterr().out.split()
    assert (rank, path) == ("1", str(pictures / "coffee.png"))
