"""The image and the unit that people deploy with: linted, shut in, and saying only what the program understands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import closing
from pathlib import Path

import click
import pytest
from serving import serving

from searchengine.cli import group
from searchengine.settings import load_settings
from searchengine.web.app import create_app
from searchengine.web.security import Access
from searchengine.web.service import Service

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
UNIT = (ROOT / "scripts" / "searchengine.service").read_text("utf-8")
API = (ROOT / "docs" / "api.md").read_text("utf-8")
PROGRAM = "/opt/searchengine/bin/searchengine"


def understood(words: list[str]) -> None:
    """Raises click's errors for a command line that the program would refuse."""
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words
    with click.Context(command, info_name=words[0]) as context:
        command.parse_args(context, words[1:])


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return re.findall(rf"^\s*{name} (.*)$", joined, re.MULTILINE)


def linter(name: str) -> str:
    beside_python = Path(sysconfig.get_path("scripts"), name)
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint_finds_nothing_to_say_of_the_dockerfile() -> None:
    done = subprocess.run([linter("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_a_user_without_rights() -> None:
    *_, user = instructions("USER")
    uid, gid = user.split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
    assert last_stage.index("\nUSER") > last_stage.index("\nRUN")


def test_the_builder_is_sent_what_the_dockerfile_copies_and_nothing_else() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


def test_the_build_needs_the_torch_that_the_tests_ran_with() -> None:
    pinned = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert len(pinned) == 1
    assert "sed -n 's/^torch==//p' constraints.txt" in DOCKERFILE


@pytest.mark.parametrize(("variant", "code"), [("cpu", 0), ("cuda", 0), ("rocm", 2)])
def test_only_variants_that_there_are_can_be_built(variant: str, code: int) -> None:
    choice = re.search(r"case .*? esac", re.sub(r"\\\n\s*", " ", DOCKERFILE))
    assert choice
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", choice[0]], env={"VARIANT": variant}, capture_output=True)
    assert done.returncode == code


def test_the_image_serves_by_a_command_line_that_is_understood() -> None:
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["searchengine"]
    understood(json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[-1]))


def test_the_unit_starts_a_command_line_that_is_understood() -> None:
    program, *words = shlex.split(re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)[0])
    assert program == PROGRAM
    understood(words)


@pytest.fixture
def installed_unit(tmp_path: Path) -> Path:
    """The unit as on a machine that has the program: systemd looks for the file."""
    unit = tmp_path / "searchengine.service"
    unit.write_text(UNIT.replace(PROGRAM, sys.executable), "utf-8")
    return unit


def test_systemd_finds_nothing_to_say_of_the_unit(installed_unit: Path) -> None:
    done = subprocess.run([linter("systemd-analyze"), "verify", installed_unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_rates_the_unit_as_well_shut_in(installed_unit: Path) -> None:
    rated = [linter("systemd-analyze"), "security", "--offline=true", "--threshold=20", installed_unit]
    done = subprocess.run(rated, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_a_run_that_cannot_succeed_is_not_started_again() -> None:
    assert re.findall(r"^RestartPreventExitStatus=(.*)$", UNIT, re.MULTILINE) == ["2 3 4"]


def test_the_commands_in_the_document_are_understood() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", API, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if re.search(r"\bsearchengine (serve|index|mcp)\b", line)]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)
        understood(words[next(i for i, word in enumerate(words) if word in ("serve", "index", "mcp")) :])
    (assistants,) = re.findall(r'"args": (\[.*?\])', API)
    understood(json.loads(assistants))


def test_the_health_check_of_the_image_asks_a_service_that_wants_a_token(tmp_path: Path) -> None:
    (check,) = re.findall(r"HEALTHCHECK .*?CMD (\[.*\])$", re.sub(r"\\\n\s*", " ", DOCKERFILE), re.MULTILINE)
    _, *arguments = json.loads(check)

    def exit_code(port: int) -> int:
        command = [sys.executable, *(argument.replace(":8000", f":{port}") for argument in arguments)]
        return subprocess.run(command, capture_output=True, timeout=30).returncode

    with closing(Service(load_settings({"index": str(tmp_path)}))) as service:
        with serving(create_app(service, Access(host="0.0.0.0", token="a-token"))) as server:
            assert exit_code(server.port) == 0
    assert exit_code(server.port) != 0
