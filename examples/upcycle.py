"""A dense Hugging Face folder becomes a mixture of experts and trains on.

  python examples/upcycle.py --out runs/upcycled                  # makes a small dense folder first
  python examples/upcycle.py --dense llama --out runs/upcycled    # a Llama, Mistral or Qwen3 folder of yours

dense run -> to-hf -> from-hf --upcycle-experts -> checkpoint.load -> the run of the mixture. Each expert starts as a
copy of the dense MLP, and the weights of the chosen experts sum to 1, so the first losses are the dense model's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = 4
STEPS = 6


def run(*command: str) -> None:
    sys.stdout.write(f"$ {' '.join(command)}\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def dense_folder(out: Path) -> Path:
    """A small Llama folder, trained for a few steps."""
    run("-m", "gpt4moe.train", "+experiment=tiny", "data=mock", "model=dense_tiny", f"run.root={out}", "run.name=dense",
        f"training.steps={STEPS}", "tracking.wandb=disabled")  # fmt: skip
    run("tools/convert_checkpoint.py", "to-hf", str(out / "dense"), str(out / "llama"), "--dtype", "fp32")
    return out / "llama"


def model_overrides(manifest: Path) -> list[str]:
    """The model of a converted folder as overrides."""
    model = json.loads(manifest.read_text())["config"]["model"]
    moe = model["moe"]
    given = {f"model.{key}": value for key, value in model.items() if not isinstance(value, dict)}
    given |= {f"model.moe.{key}": moe[key] for key in ("num_experts", "ffn_hidden_size", "top_k")}
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="a dense Hugging Face folder; default: a small one is made")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out = given.out.resolve()
    dense = given.dense or dense_folder(out)
    run("tools/convert_checkpoint.py", "from-hf", str(dense), str(out / "upcycled"), "--upcycle-experts", str(EXPERTS))
    run("-m", "gpt4moe.train", "+experiment=tiny", "data=mock", *model_overrides(out / "upcycled" / "manifest.json"),
        f"checkpoint.load={out / 'upcycled'}", f"run.root={out}", "run.name=mixture", f"training.steps={STEPS}",
        "tracking.wandb=disabled")  # fmt: skip
    sys.stdout.write(f"{EXPERTS} experts, losses {', '.join(f'{loss:.3f}' for loss in losses(out / 'mixture'))}\n")


if __name__ == "__main__":
    main()
