"""Room `config`, storey 0: what a run may be. Dataclasses with their checks; no torch, no other room.

model.py moe.py parallel.py data.py optimizer.py training.py cluster.py   one dataclass per Hydra group
optimizer_table.py  each optimizer's state tensors, and the engines that run it
run.py      RunConfig: the groups together
load.py     load_run_config: YAML + overrides -> checked RunConfig (the only file with hydra and omegaconf)
plan.py     what tools/plan.py is asked
planned.py  parts that only the planner counts
resilience.py  the brake on restarts, time for the report
missing.py  the mark of a value that must be given
"""
