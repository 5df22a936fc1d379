"""Room `moe`, storey 2: the expert-parallel MLP. May import config, parallel, megatron.core, deepspeed's expert parts.

router.py      logits -> which experts, with which weight; the table of routers
capacity.py    which assignments fit an expert's slots
losses.py      load-balancing and z losses over a micro-batch; how they join the backward pass
dispatch.py    tokens -> expert ranks -> tokens (DeepSpeed's split plan, all-to-all, permutation, combine)
experts.py     the SwiGLU experts of one rank
layer.py       ExpertParallelMLP: all of it behind Megatron's MLP seam
statistics.py  what one step's routing looked like: load, drops, entropy, losses
"""
