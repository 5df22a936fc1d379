"""Memory, device hours, money and time left of a run: measured here, computed in runlog.usage."""

import resource

import torch

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.cluster import Generation
from gpt4moe.runlog.events_log import EVENTS_FILE, own_events, read_events
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.run_files import process_began
from gpt4moe.runlog.usage import Devices, Usage
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult


class Resources(Callback):
    """Adds runlog.usage.USAGE_METRICS to the record. Before Tracking, which drops the records of steps that are
    redone: they cost money too."""

    def __init__(self) -> None:
        self.usage: Usage | None = None

    def on_start(self, context: TrainingContext) -> None:
        run, devices, earlier = context.run, context.groups.layout.world_size, []
        if context.groups.is_first_rank:
            # In a run folder copied from another run, only this run's own launches are charged.
            events = own_events(read_events(context.folder.path / EVENTS_FILE))
            copied = events[0]["resumed_step"] if events else 0
            earlier = [record for record in context.earlier.records if record["step"] > copied]
        is_described = (run.cluster.generation is Generation.cpu) == (context.groups.device.type == "cpu")
        self.usage = Usage(
            Devices(
                count=devices,
                peak_flops=devices * run.cluster.peak_flops(run.precision.dtype) if is_described else None,
                usd_per_hour=run.cluster.usd_per_hour,
            ),
            began=process_began("self"),
            flops_per_token=flops_per_token(run.model).model,
            total_steps=run.training.steps,
            earlier=earlier,
        )

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        assert self.usage is not None, "on_start comes first"
        self.usage.add_to(record)


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank has had at most. The fullest rank's come with the signals (callbacks/preemption.py)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
