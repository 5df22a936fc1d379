"""Room `pages`, storey 5: pictures and pages for people: report.html, plan pages, figures. No torch.

charts.py        line charts as inline SVG
panel_charts.py  a dashboard's panels -> charts
series.py        records -> points; smoothing and thinning
plots.py         PNG figures by matplotlib
heat_map.py      expert load as inline SVG
load_maps.py     windows of expert load as small heat maps
gantt.py         a pipeline step as inline SVG
schedule_page.py the pipeline schedule as text, JSON, a section of the report
wire_table.py    bytes on the wire, counted and by formula, as a table
goodput_page.py  seconds by cause as a bar and table of the report
report.py        report.html, one self-contained file
report_page.py   the report's style sheet and script
run_report.py    a run folder -> its report
plan_page.py plan_answer.py   what tools/plan.py shows

May import runlog and the planner. Nothing that trains imports this room.
"""
