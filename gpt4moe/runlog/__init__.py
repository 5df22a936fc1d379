"""Room `runlog`, storey 4: the facts of a run: name, write and send them. No torch, no pictures.

metrics.py       METRICS: name -> unit, meaning, parts; which are timings
metrics_table.py that table as Markdown, for docs/metrics.md
metrics_log.py   MetricsLog: metrics.jsonl, every step exactly once
event_fields.py  EVENTS: kind -> fields, and their checks
events_log.py    EventsLog: events.jsonl, starts, pauses and ends
waits.py         what a start waits for, and since when
goodput.py       events + metrics -> seconds by cause
run_process.py   whether a run folder's process lives
console.py       live progress on a terminal, single lines elsewhere; the two-line error
tool_script.py   help, bad input, exit status of tools
wandb_run.py     embassy: wandb, one run over all restarts
wandb_mark.py    the last step that wandb has
wandb_workspace.py embassy: a dashboard -> a wandb workspace
pace.py          how fast steps go by, time left
dashboard.py     configs/dashboard.yaml: panels and alerts, checked
alerts.py        rules over a metric's values; which alerts are on
balance.py       what a table of tokens per expert says
load_history.py  tokens of every expert over the whole run, in windows that grow
atomic_file.py   write whole files or nothing

Called by training callbacks, the demo and tools, on the logging rank alone. Never imports training or model.
"""
