"""Room `launch`, storey 5: is this cluster fit for this run? Asked before the run, on its nodes.

    overrides --command--> run --preflight--> every rank's facts, files, speeds --> evidence --checks--> results

    command.py        tools/preflight.py: overrides in, table out
    preflight.py      all of it, in order; every rank (torch)
    meeting.py        messages of ranks without process groups (torch)
    facts.py          what a rank sees: versions, memory, GPU
    rank_files.py     its data's fingerprint, its disk's speed
    speed.py          products and messages of a rank, timed (torch)
    evidence.py       what checks judge by; a check's result
    checks_ranks.py   came, versions, GPUs, memory, placement
    checks_plan.py    layout, planned memory, first checkpoint in time
    checks_files.py   data, run folder, space, write speed
    checks_speed.py   slow ranks, groups, nodes

A check is a function of the evidence alone.
"""
