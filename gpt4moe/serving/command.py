"""The command of tools/serve.py: arguments, the model on this launch's ranks, the server of rank 0 until a signal."""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gpt4moe.convert.verify import open_weights
from gpt4moe.inference.command import (
    Arguments,
    add_layout,
    add_limits,
    add_sight,
    closed_stdout,
    require_positive,
    seen,
    wanted_limits,
    wanted_parallel,
    write_stdout,
)
from gpt4moe.inference.load import open_folder, placed, require_placeable
from gpt4moe.inference.sight import sight_of
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.environment import Environment
from gpt4moe.serving.desk import Desk
from gpt4moe.serving.engine import Engine
from gpt4moe.serving.http import Routes, bound_socket, listening
from gpt4moe.serving.signals import ended_by_signal


def parser(description: str) -> argparse.ArgumentParser:
    out = Arguments(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="a step folder, a run folder (its latest checkpoint), a Hugging Face "
                     "folder, or one made by to-inference")  # fmt: skip
    out.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    out.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one (default 8000)")
    out.add_argument("--name", help="the model's name for clients (default: the run's or folder's name)")
    out.add_argument("--max-queue", type=int, default=64, help="texts that may wait (default 64); more are refused")
    add_sight(out.add_argument_group("images", "of a vision model"))
    add_limits(add_layout(out))
    return out


def run(options: argparse.Namespace, environment: Environment) -> None:
    """This rank's part, until INT or TERM. Raises: Gpt4MoeError, the same on every rank."""
    require_positive(options, "max_rows", "max_queue")
    opened = open_folder(options.folder, open_weights)
    sight = sight_of(opened.run, opened.words(), options.image_token)
    opened = seen(options, opened, has_images=sight.reads_images)
    parallel = wanted_parallel(options, opened, environment)
    require_placeable(replace(opened.run, parallel=parallel), environment.world_size)
    limits = wanted_limits(options)
    with placed(opened, parallel=parallel, environment=environment) as model, ExitStack() as open_things:
        is_first = model.groups.is_first_rank
        desk = Desk(limits.max_rows + options.max_queue) if is_first else None
        engine = Engine(model, sight, limits, desk)
        listener, told = None, ""
        with raise_together(model.groups):
            if is_first:
                listener = bound_socket(options.host, options.port)
        if desk is not None and listener is not None:
            name = options.name or options.folder.resolve().name
            app = Routes(desk, sight, name, engine.check, options.host).app()
            open_things.enter_context(listening(app, listener, max_texts=desk.max_texts))
            # Before the listener ends, clients that still wait are told.
            open_things.callback(desk.close, "The server has ended.")
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            told = f"Serving {name} at http://{shown}:{port}/v1, tp {parallel.tp} x pp {parallel.pp}. Ctrl-C ends it.\n"
        with raise_together(model.groups):
            if is_first:
                _show(told)

        def close() -> None:
            if desk is not None:
                desk.close("The server is ending.")

        with ended_by_signal(close, speaks=is_first):
            engine.run()


def _show(text: str) -> None:
    """Raises: LaunchError when nobody reads stdout."""
    try:
        write_stdout(text)
    except OSError as error:
        raise closed_stdout("before the server's address", error, "send it to a file.") from error
