"""Files of a run folder that training writes and pages draw."""

EXPERT_LOAD_FILE = "expert_load.json"
"""{"layers": [...], "tokens": [[...]], "first_step", "last_step"}: tokens per expert over the last steps of a start;
"history": load_history.LoadHistory, over the whole run."""

WIRE_FILE = "wire.json"
"""{"step", "ranks", "sent": {group: {kind: bytes}}}: what the first step of the last start sent, all ranks together."""
