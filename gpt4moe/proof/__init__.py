"""Room `proof`, storey 6: a layout against one process, number by number. Above `training`, because it trains.

    run --shrink--> small run --launch, ranks--> answers of the ranks --outcome--> logical tensors

    phase.py     one short training: which run, how many steps, by which update
    launch.py    gloo ranks of a fork server
    ranks.py     what one rank does (torch, megatron)
    batches.py   micro-batches, the same set on every layout
    outcome.py   answers of all ranks as whole tensors

Without torch: phase, launch, outcome. Called by tools/prove_layout.py and the tests.
"""
