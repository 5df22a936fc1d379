"""Where metrics go: metrics.jsonl (the truth), the console, wandb. On the first rank alone."""

from gpt4moe.config.load import config_to_dict
from gpt4moe.errors import LaunchError
from gpt4moe.runlog.console import Console
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import MetricsLog
from gpt4moe.runlog.wandb_run import WandbRun
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Tracking(Callback):
    def __init__(self) -> None:
        self.log: MetricsLog | None = None
        self.console: Console | None = None
        self.wandb: WandbRun | None = None

    def on_start(self, context: TrainingContext) -> None:
        if not context.groups.is_first_rank:
            return
        run, folder = context.run, context.folder
        self.log = MetricsLog.open(folder.metrics, context.state.step, context.earlier)
        self.wandb = WandbRun.start(run.tracking, folder.path, run.run.name, config_to_dict(run))
        if self.wandb.run is not None:
            # Steps that wandb missed: it had failed, or was off.
            for record in context.earlier.up_to(context.state.step).records:
                self.wandb.log(record)
        self.console = Console(run.training.steps, context.state.step, run.run.name)
        self.console.message(f"{run.model.name} on {context.groups.layout.describe()}; run folder {folder.path}")
        self.console.start()

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        if self.log and self.console and self.wandb:
            try:
                self.log.write(record)
                if context.is_saved_step:
                    self.log.sync()
            except LaunchError as error:  # this rank alone must not leave: the others would wait for it
                context.refusal = error
            self.console.step(record)
            self.wandb.log(record)
            if context.stop_requested:
                self.console.message(
                    f"{context.stop_requested} received: saving step {context.state.step}, then ending."
                )
            elif context.save_requested:
                self.console.message(f"SIGUSR1 received: saving step {context.state.step}, then going on.")

    def on_exit(self, context: TrainingContext) -> None:
        if self.log:
            self.log.close()
        if self.wandb:
            self.wandb.finish(0 if context.is_last_step else 1)
        if self.console and self.wandb:
            self.console.close()
            command = self.wandb.sync_command()
            if command:
                self.console.message(f"wandb was offline; to upload this run: {command}")
