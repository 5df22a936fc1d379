"""Show the pipeline schedule of a run: what each rank computes when, its idle time, and the activations it holds.

  python tools/show_schedule.py +experiment=tiny parallel.pp=2 parallel.vpp=2
  python tools/show_schedule.py +experiment=gpt4 ranks=24960 output=svg > schedule.svg
  python tools/show_schedule.py +experiment=tiny parallel.pp=4 output=json

Arguments are Hydra overrides of a run, and two of this tool's own:
  ranks=N                     ranks of the whole run; data parallelism follows (default: the fewest that fit)
  output=text | json | svg    default text

Needs no GPU and starts no ranks. Exit status: 0 done; 1 messages between stages cross or wait for ever; 2 bad input.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.config.load import load_run_config
from gpt4moe.errors import ConfigError, Gpt4MoeError
from gpt4moe.pages.schedule_page import schedule_json, schedule_svg, schedule_text
from gpt4moe.planner.pipeline_plan import PipelinePlan, checked_messages, run_pipeline
from gpt4moe.runlog.command_line import print_error

OUTPUTS = {"text": schedule_text, "json": schedule_json, "svg": schedule_svg}


def plan_of(arguments: list[str], options: dict[str, str]) -> PipelinePlan:
    """The schedule of these overrides. The tool's own options are written into `options`. Raises: Gpt4MoeError."""
    own = [argument for argument in arguments if "=" in argument and argument.split("=")[0] in options]
    options.update(argument.split("=", 1) for argument in own)
    if options["output"] not in OUTPUTS or not (options["ranks"] or "1").isdecimal() or options["ranks"] == "0":
        raise ConfigError(f"Unknown {' '.join(own)}.", f"Set output={'|'.join(OUTPUTS)}, and ranks to 1 or more.")
    run = load_run_config(["run.name=schedule", *(argument for argument in arguments if argument not in own)])
    return run_pipeline(run, int(options["ranks"]) if options["ranks"] else None)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__ or "")
        return 0
    options = {"ranks": "", "output": "text"}
    try:
        plan = plan_of(arguments, options)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    problems = checked_messages(plan)
    sys.stdout.write(OUTPUTS[options["output"]](plan, problems) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
