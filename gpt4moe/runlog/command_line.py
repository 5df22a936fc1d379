"""How a command answers a person: its help, a user's mistake in two lines, its exit status."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from gpt4moe.errors import Gpt4MoeError


def print_error(cause: str, cure: str) -> None:
    """Prints a user's mistake to stderr, without a traceback: what is wrong, and what to do."""
    console = Console(stderr=True, highlight=False)
    for label, style, text in (("error:", "bold red", cause), ("fix:", "bold green", cure)):
        console.print(Text.assemble((label, style), " ", " ".join(text.split())), soft_wrap=True)


def run_tool(arguments: list[str], help_text: str | None, act: Callable[[list[str]], int]) -> int:
    """Runs a tool and returns its exit status.

    Args:
        arguments: of the command line; without any, and with -h or --help, the help is printed instead.
        act: the tool itself; returns its exit status.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write((help_text or "").lstrip())
        return 0 if arguments else 2
    try:
        return act(arguments)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
