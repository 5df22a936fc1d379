"""A checker in a process of its own: started by scorers.py as a script, with `module:function`; standard library alone.

    stdin: a line {"task": {...}, "text": "...", "number": 1}
    stdout: a line {"number": 1, "score": 1.0}, or with "error": "..." for the score; number 0 says that it is imported

In a process of its own a checker that hangs can be killed, and one that prints or exits disturbs nothing. What it
prints goes to stderr, of which outside.py shows a bounded part. SIGUSR1 makes it say there which line it is at.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
from typing import Any


def main(name: str) -> None:
    # The file descriptor of stdout is ours alone: what a checker prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)  # not sys.stderr, which a checker may replace
    sys.path[0] = os.getcwd()

    def answer(**fields: Any) -> None:
        sys.stdout.flush()  # what the checker printed comes before its score
        out.write(json.dumps(fields) + "\n")
        out.flush()

    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        answer(number=0, score=0.0)
    except Exception as error:  # whatever an import raises is the user's to read
        answer(number=0, error=_said(error))
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found: dict[str, Any] = {"score": float(function(asked["task"], asked["text"]))}
        except Exception as error:
            found = {"error": _said(error)}
        answer(number=asked["number"], **found)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(sys.argv[1])
