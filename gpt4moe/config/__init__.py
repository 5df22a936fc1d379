"""Room `config`, storey 0: what a run may be. Dataclasses with their checks; no torch, no other room.

model.py moe.py parallel.py optimizer.py training.py kernels.py stage.py data.py cluster.py   the Hydra groups
resilience.py   when restarts end; what is done about wrong numbers
vision.py   the vision parts of a model
lora.py     adapters, of stage and model
step_sizes.py       the batch size of every step, the samples of N steps
optimizer_table.py  each optimizer's state tensors, and the engines that run it
run.py      RunConfig: the groups together
checksums.py        SHA256SUMS of files that no manifest has
own_files.py        which files a manifest may name; where links of a download may lead
yaml_text.py        YAML of a file that somebody may have damaged
typed.py    what JSON gives -> a dataclass whose fields have their types; of manifests; their seal
cures.py            what a key may be, in words
compose.py  Hydra's composition for our files alone
plain.py    objects -> plain data
stored.py   plain data as it was stored -> objects
load.py     load_run_config: YAML + overrides -> checked RunConfig (it and compose.py alone know Hydra)
plan.py     the keys of tools/plan.py
serve_command.py    the words of `tools/plan.py serve`
beyond.py   those that the trainer lacks
"""

from typing import Any

MISSING: Any = "???"
"""Default of a field that every run must set. It is OmegaConf's mark, written here so that nobody imports OmegaConf."""
