"""What a run uses: share of the devices' peak, device hours and money, time left.

metrics.jsonl before this start -> device hours so far --+ this process's age x ranks -> device_hours, cost_usd

A copied run folder under a new name pays for its own starts alone; its parent's steps stay as they are.
"""

import resource
import time

import torch

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.cluster import Generation
from gpt4moe.runlog.events_log import EVENTS_FILE, own_events, read_events
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.pace import Pace
from gpt4moe.runlog.run_process import process_began
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Resources(Callback):
    """Before Tracking, which drops the records of steps that are redone: they cost money too."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.last_time: float | None = None
        self.earlier_device_hours = self.earlier_usd = 0.0
        self.flops_per_token = self.began = 0.0

    def on_start(self, context: TrainingContext) -> None:
        if context.groups.is_first_rank:
            events = own_events(read_events(context.folder.path / EVENTS_FILE))
            copied = events[0]["resumed_step"] if events else 0
            records = [record for record in context.earlier.records if record["step"] > copied]
            self.earlier_device_hours = max((record.get("device_hours", 0.0) for record in records), default=0.0)
            self.earlier_usd = max((record.get("cost_usd", 0.0) for record in records), default=0.0)
        self.flops_per_token = flops_per_token(context.run.model).model
        self.began = process_began("self")

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        now = self.pace.mark(context.state.step)
        if self.last_time is not None:
            record["other_seconds"] = max(0.0, now - self.last_time - record["step_seconds"])
        self.last_time = now
        eta = self.pace.eta_seconds(context.run.training.steps)
        if eta is not None:
            record["eta_seconds"] = eta
        self._add_money(context, record)

    def _add_money(self, context: TrainingContext, record: Record) -> None:
        run, devices = context.run, context.groups.layout.world_size
        hours = devices * (time.time() - self.began) / 3600
        record["device_hours"] = self.earlier_device_hours + hours
        if (run.cluster.generation is Generation.cpu) != (context.groups.device.type == "cpu"):
            return  # the config describes other devices than these
        peak = devices * run.cluster.peak_flops(run.precision.dtype)
        record["mfu"] = self.flops_per_token * record["tokens_per_second"] / peak
        if run.cluster.usd_per_hour is not None:
            record["cost_usd"] = self.earlier_usd + hours * run.cluster.usd_per_hour


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank has had at most. The fullest rank's come with the signals (callbacks/preemption.py)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
