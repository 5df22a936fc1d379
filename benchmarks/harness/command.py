"""The command line of a benchmark. Unknown arguments are refused before anything is measured."""

import argparse


def read_options(text: str | None, arguments: list[str], **flags: str) -> argparse.Namespace:
    """Switches of a benchmark, each True where it was given.

    Args:
        text: the benchmark's docstring, which --help prints.
        flags: name of a switch -> what it does.
    Raises: SystemExit with 2 for what is none of them, with 0 after --help.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args(arguments)
