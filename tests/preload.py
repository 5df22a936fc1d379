"""What the fork server of tests/spawn.py loads once for all ranks."""

import warnings

warnings.filterwarnings("ignore")

import matplotlib.figure  # noqa: E402, F401

import gpt4moe.train  # noqa: E402
import gpt4moe.training.build  # noqa: E402, F401
