"""The errors a user can cause. Each says what is wrong with the numbers and what to change."""


class Gpt4MoeError(Exception):
    """Bad input, found before anything heavy starts: one line of cause, one of cure. Ends a command with status 2."""

    exit_code = 2

    def __init__(self, cause: str, cure: str):
        super().__init__(f"{cause}\n{cure}")
        self.cause = cause
        self.cure = cure


class ConfigError(Gpt4MoeError):
    """A key or a value that a run cannot have."""


class LayoutError(Gpt4MoeError):
    """A layout that does not fit the world, the model or the batch."""


class DataError(Gpt4MoeError):
    """A corpus or tokenizer that is missing, damaged or of another vocabulary."""


class CheckpointError(Gpt4MoeError):
    """A checkpoint that is absent, incomplete or of another run."""


class ConversionError(Gpt4MoeError):
    """A folder that cannot be read, or a model that the other format cannot say."""


class LaunchError(Gpt4MoeError):
    """Ranks, run folder or machine not as the run needs them."""


class DivergenceError(Gpt4MoeError):
    """A loss or gradient that is not finite: training stops before it can spoil the weights."""

    exit_code = 1


class ReplicaError(Gpt4MoeError):
    """Copies of one tensor on several ranks that are not equal any more."""

    exit_code = 1
