"""Room `telemetry`, storey 4: name, write, send and draw what a run does. No torch: plain numbers in.

    metrics.py       METRICS: name -> unit, meaning, parts; which are timings
    metrics_table.py that table as Markdown, for docs/metrics.md
    metrics_log.py   MetricsLog: metrics.jsonl, every step exactly once
    event_fields.py  EVENTS: kind -> fields, and their checks
    events_log.py    EventsLog: events.jsonl, starts, pauses and ends
    waits.py         what a start waits for, and since when
    goodput.py       events + metrics -> seconds by cause
    goodput_page.py  seconds by cause as a bar and table of the report
    slurm_queue.py   states and times of jobs, if there is Slurm
    run_process.py   whether a run folder's process lives
    run_folders.py   which folders are runs
    run_state.py     running, killed ...; what a living run is doing
    run_status.py    RunStatus: where each run of a folder stands
    run_table.py     runs and one run's account as terminal tables
    console.py       live progress on a terminal, single lines elsewhere; the two-line error
    wandb_run.py     embassy: wandb, one run over all restarts
    wandb_mark.py    the last step that wandb has
    pace.py          how fast steps go by, time left
    dashboard.py     configs/dashboard.yaml: panels and alerts, checked
    alerts.py        rules over a metric's values; which alerts are on
    panel_charts.py  a dashboard's panels -> charts
    wandb_workspace.py embassy: a dashboard -> a wandb workspace
    series.py        records -> points; smoothing and thinning
    balance.py       what a table of tokens per expert says
    plots.py         PNG figures by matplotlib
    charts.py        line charts as inline SVG
    heat_map.py      expert load as inline SVG
    load_history.py  tokens of every expert over the whole run, in windows that grow
    load_maps.py     those windows as small heat maps
    gantt.py         a pipeline step as inline SVG
    schedule_page.py the pipeline schedule as text, JSON, a section of the report
    wire_table.py    bytes on the wire, counted and by formula, as a table
    report.py        report.html, one self-contained file
    report_page.py   the report's style sheet and script
    browser.py       headless Chromium over pipes: screenshots, and the report's tests
    atomic_file.py   write whole files or nothing

Called by training callbacks, the demo and tools, on the logging rank alone. Never imports training or model.
"""
