"""What the fork server of tests/spawn.py loads once for all ranks."""

import warnings

warnings.filterwarnings("ignore")

import gpt4moe.model.gpt  # noqa: E402
import gpt4moe.training.engine_megatron  # noqa: E402
import gpt4moe.training.step  # noqa: E402, F401
