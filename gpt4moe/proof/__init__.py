"""Room `proof`, storey 6: compares a layout with one process, number by number. Above `training`, because it trains.

    run --mesh, shrink--> small run --plan--> phases --ranks--> outcomes --compare, suspects--> proof --proof_report

command.py        arguments in, report and exit status out
prove.py          one proof from start to verdict
mesh.py           smaller meshes for a large one
shrink.py         a small run of the same kind
plan.py           the short trainings of a proof
preload.py        imports for the fork server (torch)
ranks.py          trains one rank, returns its numbers (torch)
watch.py          notes every part's output on a rank (torch)
batches.py        synthetic micro-batches, equal on every layout (torch)
outcome.py        answers of all ranks as whole tensors
compare.py        relative differences and their tolerances
round_off.py      differences that round-off alone makes
bf16.py           the comparison where rounding is large
replay.py         clipping and AdamW once more, in fp64
evidence.py       what differs, prepared for the rules
first_step.py     rules for forward pass, gradients and norm
suspects.py       all rules, in the order they are asked
proof_report.py   text, JSON, and what was not proved

Without torch, but for the files marked. tools/prove_layout.py and the tests call it.
"""
