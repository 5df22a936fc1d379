"""The mark of a value that a run must give (OmegaConf's own spelling, without importing it)."""

from typing import Any

MISSING: Any = "???"
