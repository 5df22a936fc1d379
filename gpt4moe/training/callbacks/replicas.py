"""Every training.check_replicas_every steps: whether copies of one tensor on several ranks are still equal to the bit.

Before the step's checkpoint, so that a state that fell apart is not saved. A router whose copies differ sends tokens to
other experts than its neighbours think, and no loss says so.
"""

from gpt4moe.errors import Gpt4MoeError, ReplicaError
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.runlog.metrics import Record
from gpt4moe.training.replicas import unequal_copies
from gpt4moe.training.state import Callback, TrainingContext
from gpt4moe.training.step import StepResult

_NAMED = 3
"""Tensors that an error names; it counts the rest."""


class Replicas(Callback):
    def __init__(self) -> None:
        self.last_equal = 0

    def on_start(self, context: TrainingContext) -> None:
        self.last_equal = context.state.step

    def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
        """Raises: ReplicaError on every rank."""
        every, step = context.run.training.check_replicas_every, context.state.step
        if not every or step % every:
            return
        with context.pause("replica_check"):
            found = unequal_copies(context.engine, context.groups)
        try:
            with raise_together(context.groups):
                if found:
                    words = [f"{it.name} on ranks {it.odd_ranks} (not on {it.other_ranks})" for it in found[:_NAMED]]
                    more = f" and {len(found) - _NAMED} more tensors" if len(found) > _NAMED else ""
                    raise ReplicaError(
                        f"After step {step}, copies that must be equal to the bit are not: {', '.join(words)}{more}.",
                        f"Start again from a checkpoint of step {self.last_equal} or before: they were equal then. "
                        "Odd values on one rank alone suggest its hardware.",
                    )
        except Gpt4MoeError as error:  # a rank of another stage heard it: the same error, the same exit status
            raise ReplicaError(error.cause, error.cure) from None
        self.last_equal = step
