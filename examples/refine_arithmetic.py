"""Trains a tiny model on two-digit arithmetic and string operations, then compares ways to spend 16 candidates.

  python examples/refine_arithmetic.py --out runs/checkable          # about ten minutes on two CPU cores

make the set -> train -> tools/refine.py: samples, refinements by likelihood, majority and a checker -> a table, a page.
What is there already is not made again. The numbers are printed as they come out; the checker knows the right answer.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package lies beside examples/

from gpt4moe.refinement import comparison
from gpt4moe.refinement.checkable import write_set
from gpt4moe.refinement.page import write_page
from gpt4moe.refinement.tasks import read_tasks
from gpt4moe.refinement.trace import read_trace

ROOT = Path(__file__).resolve().parents[1]
SCORERS = {"likelihood": "likelihood", "majority": "majority", "checker": "gpt4moe.refinement.checkable:check"}


def run(*command: str) -> None:
    sys.stdout.write(f"$ python {' '.join(command)}\n")
    sys.stdout.flush()
    # Several threads cost more than they give with matrices as small as these, and much more on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of training (default 1000)")
    parser.add_argument("--rounds", type=int, default=16, help="of refinement (default 16)")
    parser.add_argument("--tasks", type=int, default=200, help="test tasks (default 200)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of all candidates (default 1)")
    given = parser.parse_args()
    out, rounds = given.out.resolve(), given.rounds
    if not (out / "data" / "tasks.jsonl").exists():
        write_set(out / "data", num_test=given.tasks)
    if not (out / "model" / "checkpoints" / f"step-{given.steps:08d}").exists():
        run("-m", "gpt4moe.train", "+experiment=tiny", f"data.path={out / 'data'}", "model.vocab_size=257",
            "model.seq_length=64", "model.moe.num_experts=8", "training.global_batch_size=32",
            "training.micro_batch_size=16", f"training.steps={given.steps}", f"schedule.total_steps={given.steps}",
            f"run.root={out}", "run.name=model", "tracking.wandb=disabled")  # fmt: skip

    def search(name: str, *more: str) -> None:
        run("tools/refine.py", str(out / "model"), "--input", str(out / "data" / "tasks.jsonl"), "--output",
            str(out / name), "--tokens", "12", "--stop", "\n", "--temperature", str(given.temperature), "--top-p", "1",
            "--max-rows", "128", *more)  # fmt: skip

    # A refining prompt has the task twice: within its tokens fit fewer than three times as many samples.
    search("samples", "--method", "best-of-n", "--rounds", str(3 * rounds))
    for name, scorer in SCORERS.items():
        search(f"refine-{name}", "--rounds", str(rounds), "--scorer", scorer)

    tasks = read_tasks(out / "data" / "tasks.jsonl")
    _, samples = read_trace(out / "samples" / "trace.jsonl", tasks)
    refined = {name: read_trace(out / f"refine-{name}" / "trace.jsonl", tasks)[1] for name in SCORERS}
    rows, differences = comparison.compare(samples, refined, rounds)
    write_page(out / "comparison.html", f"{len(tasks)} checkable tasks", comparison.as_html(rows, differences))
    sys.stdout.write(
        f"\n{comparison.as_text(comparison.HEAD, comparison.cells(rows))}\n\n"
        f"{comparison.as_text(comparison.DIFFERENCE_HEAD, comparison.difference_cells(differences))}\n\n"
        f"{out / 'comparison.html'}\n"
    )


if __name__ == "__main__":
    main()
