"""Watch: the policy of a run. It gives the verdict on each step's numbers by the keys of resilience."""

from dataclasses import dataclass
from math import isfinite

from gpt4moe.config.resilience import Remedy
from gpt4moe.config.run import RunConfig
from gpt4moe.resilience.recent import Recent
from gpt4moe.training.update import GO_ON, Action, StepNumbers, Verdict, nonfinite, stop


@dataclass(slots=True)
class Watch:
    """Not finite, a spike, or well. `recent` is the run's (TrainState), equal on every rank, and moves here alone."""

    recent: Recent

    def __call__(self, numbers: StepNumbers, run: RunConfig) -> Verdict:
        limits = run.resilience
        if not (isfinite(numbers.grad_norm) and isfinite(numbers.loss)):
            return self._verdict(limits.on_nonfinite, numbers, run, nonfinite(numbers))
        spike = self.recent.spike(numbers.loss, numbers.grad_norm, limits)
        if spike is not None:
            return self._verdict(limits.on_spike, numbers, run, f"a spike: {spike}")
        self.recent.take(numbers.loss, numbers.grad_norm, limits.spike_window)
        return GO_ON

    def _verdict(self, remedy: Remedy, numbers: StepNumbers, run: RunConfig, what: str) -> Verdict:
        limits, recent = run.resilience, self.recent
        if remedy is Remedy.stop:
            return self._stop(numbers, run, what)
        if remedy is Remedy.go_back:
            plain = stop(numbers, run, what)  # its words are for a run that cannot go back
            return Verdict(Action.go_back, plain.cause, plain.cure)
        if remedy is Remedy.go_on:
            recent.take(numbers.loss, numbers.grad_norm, limits.spike_window)
            return Verdict(Action.go_on, what)
        if recent.skipped_in_a_row >= limits.max_skips:
            before = f"{limits.max_skips} steps before it were skipped too (resilience.max_skips)"
            return self._stop(numbers, run, f"{what}, and the {before}")
        recent.skipped_in_a_row += 1
        return Verdict(Action.skip, what)

    def _stop(self, numbers: StepNumbers, run: RunConfig, what: str) -> Verdict:
        """With what else than other rates makes the run go on: the keys of resilience."""
        verdict = stop(numbers, run, what)
        limits = run.resilience
        if not isfinite(numbers.loss + numbers.grad_norm):
            keys = (
                "resilience.on_nonfinite=skip or go_back"
                if limits.on_nonfinite is Remedy.stop
                else "resilience.max_skips higher"
            )
        elif limits.on_spike is Remedy.stop:
            keys = "resilience.on_spike=go_back, skip or go_on, or resilience.spike_deviations higher"
        else:
            keys = "resilience.on_spike=go_on, or resilience.spike_deviations or max_skips higher"
        return Verdict(verdict.action, verdict.cause, f"{verdict.cure} Or set {keys}.")
