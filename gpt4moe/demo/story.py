"""What `make train` runs: train the tiny model, kill it half-way, resume from its checkpoint, summarize.

    leg 1: launch_ranks ... -> all ranks killed (kill -9) some steps after a checkpoint
    leg 2: the same command -> resumes; the steps done again must have bitwise the same losses as before
    then: summary.py

A run that was interrupted is resumed; a finished one is only summarized again.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from rich.console import Console

from gpt4moe.checkpoint.manifest import NAME as MANIFEST
from gpt4moe.checkpoint.retention import step_folder
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import check_data
from gpt4moe.demo.summary import print_summary
from gpt4moe.errors import ConfigError, Gpt4MoeError
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics

LAYOUTS = {
    1: [],
    2: ["parallel.tp=2", "parallel.ep=2"],
    4: ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"],
    8: ["parallel.tp=2", "parallel.pp=2", "parallel.ep=4"],
}
_STEPS_PAST_CHECKPOINT = 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.story", description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, help="processes: 1, 2, 4 or 8 (default: one a GPU, without GPUs 4)")
    parser.add_argument("overrides", nargs="*", help="more Hydra overrides, e.g. training.steps=20")
    options = parser.parse_args(arguments)
    try:
        return tell(options.nproc or _default_processes(), options.overrides)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code


def tell(num_processes: int, more: list[str]) -> int:
    """All of it, on `num_processes` ranks. Raises: Gpt4MoeError for bad input, before a process starts."""
    if num_processes not in LAYOUTS:
        raise ConfigError(
            f"NPROC={num_processes} has no layout here.", f"Choose one of {', '.join(map(str, LAYOUTS))}."
        )
    console = Console(highlight=False)
    overrides = ["+experiment=tiny", f"run.name=tiny-{num_processes}", *LAYOUTS[num_processes], *more]
    run = load_run_config(overrides)
    check_data(run)
    folder = Path(run.run.root) / run.run.name
    command = _command(num_processes, overrides)
    console.rule("Training", style="dim")
    console.print(f"[dim]$ {' '.join(command)}[/dim]", soft_wrap=True)
    before: dict[int, float] = {}
    if not read_metrics(folder / METRICS_FILE):
        status, before = _killed_half_way(command, run, folder, console)
        if status:
            return status
    status = subprocess.run(command, check=False).returncode
    if status:
        return status
    if before and not _same_losses(before, folder, console):
        return 1
    return print_summary(folder, run, console)


def _default_processes() -> int:
    """Four on CPUs; with GPUs, the largest number in LAYOUTS that gives each process one."""
    import torch

    num_gpus = torch.cuda.device_count()
    return max(number for number in LAYOUTS if number <= num_gpus) if num_gpus else 4


def _command(num_processes: int, overrides: list[str]) -> list[str]:
    python = [sys.executable, "-m"]
    if num_processes > 1:
        python += ["gpt4moe.launch_ranks", "--nproc-per-node", str(num_processes), "-m"]
    return [*python, "gpt4moe.train", *overrides]


def _killed_half_way(
    command: list[str], run: RunConfig, folder: Path, console: Console
) -> tuple[int, dict[int, float]]:
    """Leg 1: kills every process some steps after the half-way checkpoint.

    Returns: 0 and step -> loss; or, when the run ended by itself before that, its exit status and nothing.
    """
    every = run.checkpoint.every or run.training.steps
    checkpoint = max(every, run.training.steps // 2 // every * every)
    wanted = min(checkpoint + _STEPS_PAST_CHECKPOINT, run.training.steps - 1)
    saved = step_folder(folder / "checkpoints", checkpoint) / MANIFEST  # saving goes on in the background
    process = subprocess.Popen(command)
    losses: dict[int, float] = {}
    try:
        while process.poll() is None and (max(losses, default=0) < wanted or not saved.exists()):
            time.sleep(0.05)
            losses = {int(record["step"]): record["loss"] for record in read_metrics(folder / METRICS_FILE)}
        if process.poll() is not None:
            return process.returncode, {}
    finally:
        if process.poll() is None:
            _kill_all(process)
            console.show_cursor(True)
    console.print()
    console.rule(f"Killed all ranks (kill -9) after step {max(losses)}; now the same command again", style="yellow")
    return 0, losses


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 for the launcher and its ranks, which have sessions of their own."""
    launcher = psutil.Process(process.pid)
    for victim in [launcher, *launcher.children(recursive=True)]:
        victim.kill()
    process.wait()


def _same_losses(before: dict[int, float], folder: Path, console: Console) -> bool:
    """Whether the steps done again had bitwise the same losses."""
    after = {int(record["step"]): record["loss"] for record in read_metrics(folder / METRICS_FILE)}
    latest = sorted((folder / "starts").glob("*.yaml"))[-1]
    first = yaml.safe_load(latest.read_text())["first_step"]
    redone = [step for step in before if step >= first]
    equal = all(before[step] == after[step] for step in redone)
    console.rule("Resume", style="dim")
    if not redone:
        console.print(f"Resumed at step {first}: the kill fell on a checkpoint, so no step was done twice.")
        return True
    console.print(f"Resumed at step {first}. Losses of the steps done twice:")
    for step in redone:
        console.print(f"  step {step}: {before[step]!r} before the kill, {after[step]!r} after the resume")
    console.print("[green]Equal to the last bit.[/green]" if equal else "[red]They differ: this is a bug.[/red]")
    return equal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
