"""tools/mixture.py as tests call it."""

import json
from typing import Any

import pytest

from tests.data.conftest import SEQ_LENGTH, VOCAB_SIZE
from tools.mixture import main

RUN = ["+experiment=tiny", f"model.vocab_size={VOCAB_SIZE}", f"model.seq_length={SEQ_LENGTH}", "training.steps=3"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """Its JSON."""
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)
