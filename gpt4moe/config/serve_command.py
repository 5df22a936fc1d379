"""The words of `python tools/plan.py`: serve, which stands for report=inference, and those that people try first."""

from dataclasses import fields

from gpt4moe.config.plan import InferencePlanConfig
from gpt4moe.errors import ConfigError

SERVE = "serve"
WRITTEN = {
    "search": "search=true",
    "plan": "nothing: a plan is what is made without a word",
    "finetune": "+experiment=gpt4_sft epochs=3, or stage=sft; stage.lora.rank=16 for adapters",
    "sft": "stage=sft",
    "lora": "stage.lora.rank=16",
    "gpt4": "+experiment=gpt4; report=leak for the numbers reported about GPT-4",
    "gpt4-numbers": "report=leak",
    "leak": "report=leak",
    "inference": SERVE,
    "calibrate": "calibrate=runs/NAME",
    "json": "output=json",
    "html": "output=html file=plan.html",
}
"""Words that are no overrides -> what to write for them."""
SERVED = {
    "search": "nothing: serve shows the best layouts of its devices beside the one that is asked for",
    "plan": "nothing: serve is the plan",
    "inference": "nothing: serve stands for it",
    "gpt4": "+experiment=gpt4",
    "json": WRITTEN["json"],
    "html": "output=html file=serve.html",
}
"""The same beside serve; of the other words it can have none."""
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


def plan_overrides(given: list[str]) -> list[str]:
    """The overrides of `plan.py`, with or without serve. Raises: ConfigError for a word that is none of its own."""
    for one in given:
        word = one.lstrip("-").replace("_", "-").lower()
        if word in WRITTEN and SERVE in given and word not in SERVED:
            raise ConfigError(f"{one!r} with serve: serve is a report of its own.", "Leave one of them out.")
        if word in WRITTEN:
            cure = (SERVED if SERVE in given else WRITTEN)[word]
            raise ConfigError(f"{one!r} is no word of plan.py, whose options are key=value.", f"Write {cure}.")
    return serving_overrides(given) if SERVE in given else given


def serving_overrides(given: list[str]) -> list[str]:
    """The overrides of `plan.py serve`: without that word, and keys of inference.* may stand without theirs.

    Raises: ConfigError for another report.
    """
    given = [one for one in given if one != SERVE]
    other = next((one for one in given if one.startswith("report=") and one != "report=inference"), None)
    if other is not None:
        raise ConfigError(f"{other} with serve: serve is a report of its own.", "Leave one of them out.")
    own = {key.name for key in fields(InferencePlanConfig)}
    return [f"inference.{one}" if one.partition("=")[0] in own else one for one in given] + ["report=inference"]
