"""Room `runlog`, storey 4: the facts of a run: name, write and send them. No torch, no pictures.

metrics.py       what a metric and a record are
step_metrics.py  loss, update and times of a step: declared, made
usage.py         pace, device hours, money, MFU: declared, made
metrics_table.py METRICS: all declarations, checked, as Markdown
metrics_log.py   MetricsLog: metrics.jsonl, every step exactly once
metrics_columns.py metrics.jsonl as columns, 8 bytes a value
metrics_glance.py metrics.jsonl for a list of runs: its last steps whole
step_lines.py    samples.jsonl, evaluations.jsonl: lines of steps
events_log.py    EventsLog: events.jsonl, launches, pauses, ends; what an event must have
waits.py         what training waits for, and since when
interruptions.py when, what, which rank, what it cost: each end of a launch before the run was done
goodput.py       events + metrics -> seconds by cause
expert_load.py   tokens of every expert over the whole run
routing_record.py routing/rank_N.jsonl: rows of each rank, layer and expert
run_files.py     names, whole-file writes, the folder's process
dashboard.py     configs/dashboard.yaml: panels and alerts, checked
alerts.py        rules over a metric's values; which alerts fail
console.py       live progress on a terminal, single lines elsewhere
command_line.py  tools: help, two-line errors, exit status
wandb_run.py     the only file that imports wandb: one run over all launches
wandb_workspace.py the only file that imports wandb_workspaces: a dashboard -> a workspace
slurm_queue.py   what squeue, sacct, scontrol say of jobs

Called by training callbacks, the demo and tools, on the logging rank alone. Never imports training or model.
"""
