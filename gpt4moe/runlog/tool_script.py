"""What tools/prove_layout.py and tools/rehearse.py share: help, errors of bad input, exit status."""

import sys
from collections.abc import Callable

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.console import error as print_error


def answer(arguments: list[str], help_text: str | None, act: Callable[[list[str]], int]) -> int:
    """What `act` makes of the arguments, its exit status; the help without any, or where it is asked for."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write((help_text or "").lstrip())
        return 0 if arguments else 2
    try:
        return act(arguments)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
