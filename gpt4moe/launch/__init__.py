"""Room `launch`, storey 5: the preflight, which checks before a run whether its nodes are fit for it.

    overrides --command--> run --preflight--> every rank's facts, files, speeds --> evidence --checks--> results

    command.py        tools/preflight.py: overrides in, table out
    preflight.py      all steps in order; every rank (torch)
    meeting.py        messages of ranks without process groups (torch)
    facts.py          what a rank sees: versions, memory, GPU
    rank_files.py     its data's fingerprint, its disk's speed
    speed.py          products and messages of a rank, timed (torch)
    evidence.py       input of the checks; a check's result
    checks_ranks.py   presence, versions, GPUs, placement
    checks_plan.py    layout, planned memory, first checkpoint in time
    checks_files.py   data, run folder, space, write speed
    checks_speed.py   slow ranks, groups, nodes

A check is a function of the evidence alone.
"""
