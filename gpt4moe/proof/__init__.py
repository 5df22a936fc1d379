"""Room `proof`, storey 6: a layout against one process, number by number. Above `training`, because it trains.

    run --mesh, shrink--> small run --plan--> phases --launch, ranks--> outcomes --compare, suspects--> proof --report

    command.py   what tools/prove_layout.py calls: overrides in, report and exit status out
    prove.py     the whole of it, in order
    mesh.py      the mesh asked for, or smaller ones that together are of its kind
    shrink.py    widths, batch and the rest of a run, made small
    depth.py     fewer layers of the same pattern
    plan.py      which phases a proof has
    phase.py     one short training: which run, how many steps, by which update
    launch.py    gloo ranks of a fork server
    ranks.py     what one rank does (torch)
    preload.py   what the fork server imports (torch)
    batches.py   micro-batches, the same set on every layout (torch)
    outcome.py   answers of all ranks as whole tensors
    compare.py   relative differences and their tolerances
    rounding.py  the same in bf16, where rounding moves right layouts too
    replay.py    clipping and AdamW once more, from a run's own gradients
    ties.py      a difference that only round-off between equal experts made: other tokens
    evidence.py suspects.py rounding_suspects.py   what differs, in terms of causes; what is likely wrong
    report.py unproved.py     for people and as JSON; what was not shown
    script.py    help, bad input, exit status of both tools

A rehearsal builds a rank of every kind on the meta device, without its world:

    rehearsal_command.py   what tools/rehearse.py calls
    rehearsal.py           which ranks, and the whole of it, in order
    rehearsal_rank.py      one rank: groups, bytes, hollow checkpoint files (torch)
    rehearsal_files.py     hollow inference files, read back
    held.py                bytes read off built objects (torch)

Without torch, but for those marked. Called by tools/prove_layout.py, tools/rehearse.py and the tests.
"""
