"""Plan a run before a GPU-hour is spent: parameters, memory, time, money, layout, bottleneck. Needs no torch, no GPU.

  python tools/plan.py +experiment=gpt4                                 one layout, as tables
  python tools/plan.py +experiment=gpt4 parallel.pp=30                  any key of a run may be changed
  python tools/plan.py +experiment=gpt4 output=json                     JSON alone; output=html file=plan.html: a page
  python tools/plan.py +experiment=gpt4 search=true                     all legal layouts that fit, fastest first
  python tools/plan.py model=mixtral_8x22b cluster=h100_80g search=true budget_usd=1e6 days=30
  python tools/plan.py serve +experiment=gpt4                           128 GPUs as tp 8 x pp 16; `serve --help`
  python tools/plan.py +experiment=gpt4_sft data.path=data/chat epochs=3 stage.lora.rank=16     fine-tuning of adapters
  python tools/plan.py report=leak                                      the numbers reported about GPT-4, claim by claim
  python tools/plan.py calibrate=runs/first                             a run of yours compared with its plan

Arguments are Hydra overrides of a run (groups are the folders of configs/), and the planner's own keys, whose defaults
are in configs/plan.yaml: gpus search top tokens epochs budget_usd days output file report calibrate imbalance
images_per_sequence detect_seconds restart_minutes time_factor save_share pue grid_kg_co2e_per_kwh stack beyond.*
docs/planner.md says how each number is computed, docs/planner-error.md how far off it was for published runs.
Exit status: 0 done; 2 bad input (an illegal layout, an unknown cluster, a budget without a price), with what would fit.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.serve_command import SERVE, SERVE_HELP, plan_overrides
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.command_line import print_error


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(SERVE_HELP if SERVE in arguments else __doc__ or "")
        return 0
    try:
        plan = load_plan_config(plan_overrides(arguments))
        if plan.reads_data:
            from gpt4moe.data.overview import take_data

            take_data(plan)
        from gpt4moe.pages.plan_answer import plan_answer

        answer = plan_answer(plan)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    if isinstance(answer, str | dict):
        sys.stdout.write(answer if isinstance(answer, str) else json.dumps(answer, indent=1) + "\n")
        return 0
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for part in answer:
        console.print(part, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
