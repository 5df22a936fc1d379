"""A checker in a process of its own: started by scorers.py as a script, with `module:function`; standard library alone.

    stdin: a line {"task": {...}, "text": "..."}     stdout: a line {"score": 1.0}, or {"error": "..."}

In a process of its own a checker that hangs can be killed, and one that prints or exits disturbs nothing.
"""

import importlib
import json
import os
import sys
from typing import Any


def main(name: str) -> None:
    # The file descriptor of stdout is ours alone: what a checker prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[0] = os.getcwd()

    def answer(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        answer(score=0.0)
    except Exception as error:  # whatever an import raises is the user's to read
        answer(error=_said(error))
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer(score=float(function(asked["task"], asked["text"])))
        except Exception as error:
            answer(error=_said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(sys.argv[1])
