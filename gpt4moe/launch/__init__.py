"""Room `launch`, storey 5: is this cluster fit for this run? Asked before the run, on its nodes.

    overrides --command--> run --preflight: every rank's facts, disk, speeds--> evidence --checks--> results --report

    command.py        what tools/preflight.py calls: overrides in, table and exit status out
    preflight.py      the whole of it, in order; every rank walks it
    meeting.py        the ranks' notes to the first one, before any process group (torch)
    facts.py          what a rank sees: versions, memory, GPU (torch for the GPU)
    data_facts.py     the data's fingerprint on this rank
    disk.py           a file in the run's root: speed, and who sees it
    speed.py          products and messages of this rank, timed (torch)
    needs.py          what the run needs, from the planner
    evidence.py       everything the checks judge by; a check's result
    checks_ranks.py   came, versions, GPUs, memory, placement
    checks_plan.py    layout, planned memory, time to the first checkpoint
    checks_files.py   data, run folder, space, write speed
    checks_speed.py   slow ranks, groups, nodes
    links.py          what the cluster's figures promise a group
    report.py         for people and as JSON

Checks are functions of the evidence alone, one a check. Called by tools/preflight.py.
"""
