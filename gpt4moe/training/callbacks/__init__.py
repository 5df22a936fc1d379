"""Features around the steps; build.build_callbacks lists them, and each declares what it needs and gives (callback.py).

events.py        events.jsonl: launch, first step, pauses, stop
measurements.py  held-out loss, device hours, money, time left
heartbeat.py     what the watchdog is told, the busiest rank
saving.py        copies compared, signals agreed on, checkpoints
probes.py        texts and tasks that the model is asked between steps
tracking.py      metrics.jsonl, console, wandb, alerts
routing_record.py  routing/rank_N.jsonl
report_files.py  wire.json, expert_load.json, loss.png, report.html
"""
