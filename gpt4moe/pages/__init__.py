"""Room `pages`, storey 5: pictures, tables and pages for people. No torch.

a run folder
    run_report.py     a run folder -> loss.png, report.html
    report.py         report.html, one self-contained file
    report_page.py    the report's style sheet and script
    availability.py   the strip of the wall time, interruptions
    report_tables.py  bytes on the wire, wall time
    charts.py         curves as inline SVG
    panel_charts.py   a dashboard's panels -> charts
    curves.py         metrics as arrays: smoothed, thinned
    expert_maps.py    expert load as heat maps
    plots.py          loss.png by matplotlib
a mixture of sources
    mixture_table.py  tokens, shares, epochs of each source
a plan
    plan_answer.py    what tools/plan.py prints or writes
    plan_page.py      a plan as one page
    upkeep_rows.py    storage, data, network, carbon of a plan
    inference_answer.py  a deployment: tables, JSON, a page
    inference_charts.py  its curves, with bars of error
    schedule_page.py  the pipeline schedule, a Gantt chart

It may import runlog, planner, pipeline and parallel. Nothing that trains imports this room: train.py hands the function
that writes the report to whoever calls it.
"""
