"""What DeepSpeed's engine does beside a step."""

import gc
import sys

import pytest
from torch import nn

from gpt4moe.training.engine_deepspeed import _Runtime

IMPORTED_BY_ITS_DESTRUCTOR = "deepspeed.module_inject.auto_ep_comm"


def test_an_engine_that_goes_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may come in the middle of an import; one inside it is a KeyError before Python 3.12."""
    monkeypatch.delitem(sys.modules, IMPORTED_BY_ITS_DESTRUCTOR, raising=False)
    engine = _Runtime.__new__(_Runtime)
    nn.Module.__init__(engine)
    engine.module = nn.Linear(1, 1)
    del engine
    gc.collect()
    assert IMPORTED_BY_ITS_DESTRUCTOR not in sys.modules
