"""Plan a run before a GPU-hour is spent: parameters, memory, time, money, layout, bottleneck. Needs no torch, no GPU.

  python tools/plan.py +experiment=gpt4                                 one layout, as tables
  python tools/plan.py +experiment=gpt4 parallel.pp=30                  any key of a run may be changed
  python tools/plan.py +experiment=gpt4 output=json                     JSON alone; output=html file=plan.html: a page
  python tools/plan.py +experiment=gpt4 search=true                     all legal layouts that fit, fastest first
  python tools/plan.py model=mixtral_8x22b cluster=h100_80g search=true budget_usd=1e6 days=30
  python tools/plan.py serve +experiment=gpt4                           128 GPUs as tp 8 x pp 16; `serve --help`
  python tools/plan.py report=leak                                      the numbers reported about GPT-4, claim by claim
  python tools/plan.py calibrate=runs/first                             a run of yours compared with its plan

Arguments are Hydra overrides of a run (groups are the folders of configs/), and the planner's own keys, whose defaults
are in configs/plan.yaml: gpus search top tokens budget_usd days output file report calibrate imbalance detect_seconds
restart_minutes time_factor. `serve` plans inference instead, and has a help of its own.
docs/planner.md says how each number is computed, docs/planner-error.md how far off it was for published runs.
Exit status: 0 done; 2 bad input (an illegal layout, an unknown cluster, a budget without a price), with what would fit.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.plan import serving_overrides
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.command_line import print_error

SERVE = "serve"
SERVE_HELP = """Plan what serving a model costs: latency, throughput and dollars, of one layout and of the three best.

  python tools/plan.py serve +experiment=gpt4                           128 A100 as tp 8 x pp 16, the reported layout
  python tools/plan.py serve model=mixtral_8x7b cluster=h100 gpus=8 tp=2 pp=1                        four copies of it
  python tools/plan.py serve model=deepseek_v3 cluster=h200 gpus=32 tp=8 pp=1 ep=32 precision=fp8    experts over all 32
  python tools/plan.py serve +experiment=gpt4 prompt_tokens=7680 new_tokens=512 sequences=64         another load
  python tools/plan.py serve +experiment=gpt4 max_token_ms=50 objective=first_token                  what is best by
  python tools/plan.py serve +experiment=gpt4 output=html file=serve.html                            curves; output=json

A request has a prompt, which is read at once (prefill), and new tokens, which come one by one (decode).
  first token      seconds until the prompt is read, where it comes alone. Products of matrices bind: more tp is faster.
  a token          milliseconds from a token to the next. Every step reads the weights in use and the caches of all
                   sequences, so memory bandwidth binds; more sequences in flight cost little until products bind.
  ... with prompts the same while prompts of other requests take their turns on the same devices.
  tokens/s         of all devices; a request takes its share of both throughputs, and its price follows.
A layout takes as many sequences as fit beside the weights and keep max_token_ms. Two more tables follow the load from
one sequence to a full memory, and from one prompt to 64 at once. Each number stands with what it may turn out as by
the errors of published deployments of its kind; where no row is known, that is said.

Keys (each also as inference.KEY): tp pp ep prompt_tokens new_tokens chunk_tokens sequences max_token_ms precision
objective. Others: gpus, imbalance, output, file, and the groups model, router, cluster, +experiment.
docs/plan-decisions.md says how it is computed. Exit status: 0 done; 2 bad input, with what would fit.
"""


def main(arguments: list[str]) -> int:
    serves = SERVE in arguments
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(SERVE_HELP if serves else __doc__ or "")
        return 0
    try:
        plan = load_plan_config(serving_overrides([one for one in arguments if one != SERVE]) if serves else arguments)
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
