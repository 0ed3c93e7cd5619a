"""The command line: one short module a command, loaded only when that command runs."""

from __future__ import annotations

import importlib
import keyword
import os
import signal
import sys
import warnings
from typing import Any

import click

from searchengine import __version__
from searchengine.errors import SearchEngineError
from searchengine.text import printable

INTERRUPTED = 130
UNUSABLE = 3

# name -> first line of its help, so that `searchengine --help` need not import the commands.
COMMANDS = {
    "index": "Crawl photo folders and bring the index up to date.",
    "search": "Find photos by describing them, or by another picture.",
    "similar": "Find photos that look like a picture or an indexed photo.",
    "classify": "Sort photos into classes that you name, zero-shot.",
    "probe": "Learn classes from photos that you labelled, and apply them.",
    "duplicates": "Find copies of the same photo, exact or nearly.",
    "tags": "List the labels that classify kept for searches.",
    "status": "Show what is in the index.",
    "verify": "Check the index, and the photos if you like; repair it.",
    "compact": "Merge segments, and build what makes searches in large libraries fast.",
    "reencode": "Change the model of an index without a gap.",
    "copy": "Copy an index to another place, or into Milvus and back.",
    "export": "Write photos with their vectors as files for other programs.",
    "import": "Take photos with their vectors from such files into an index.",
    "serve": "Search in a browser, and from programs, over HTTP.",
    "mcp": "Let assistants search the library: an MCP server on stdio.",
    "warm": "Keep an index loaded, so that searches answer at once.",
    "evaluate": "Measure retrieval on captioned photos.",
    "train": "Train projection heads on your own captioned photos.",
    "models": "List the encoders; download or import one.",
    "config": "Show each setting, its value and where it came from.",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"searchengine.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:  searchengine index ~/Pictures  &&  searchengine search 'a dog on a beach'",
)
@click.version_option(__version__, prog_name="searchengine")
def group() -> None:
    """Semantic search over photos.

    Exit codes: 0 found or done, 1 nothing found or problems found (verify), 2 wrong usage, 3 index or store unusable,
    4 model or weights unusable, 130 interrupted.
    """


def main() -> None:
    """Run the command line; every error becomes one line on standard error and the documented exit code."""
    # What libraries grumble about a user's photos is recorded as a reason, if it matters.
    warnings.simplefilter("ignore")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started this process
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        result: Any = group.main(standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except SearchEngineError as error:
        code = _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        code = _fail("interrupted; what was committed is kept, run again to go on", INTERRUPTED)
    except OSError as error:
        where = f" {printable(str(error.filename))}" if error.filename else ""
        code = _fail(f"a file cannot be read or written:{where} {error.strerror or error}", UNUSABLE)
    except Exception as error:
        if os.environ.get("SEARCHENGINE_DEBUG"):
            raise
        code = _fail(f"internal error, {type(error).__name__}: {error} (SEARCHENGINE_DEBUG=1 shows where)", UNUSABLE)
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    try:
        click.echo(f"searchengine: {' '.join(message.split())}", err=True)
    except OSError:  # a full disk below it; the code still tells, unless Python tries again when it ends
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return code
