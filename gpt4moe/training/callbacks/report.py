"""placeholder"""

from gpt4moe.training.state import Callback


class Report(Callback):
    pass
