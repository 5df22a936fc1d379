"""Room `moe`, storey 2: the expert-parallel MLP. May import config, parallel, megatron.core, deepspeed's expert parts.

router.py      the table of routers
routers/       the kinds of routers: logits -> which experts, with which weight
pool.py        one micro-batch gathered over tp x cp, and its order
auxiliary.py   what a layer's losses sum over the pool
capacity.py    which assignments fit an expert's slots
losses.py      load-balancing and z losses; how they join the backward pass
dispatch.py    tokens -> expert ranks -> tokens (DeepSpeed's split plan, all-to-all, permutation, combine)
experts.py     the SwiGLU experts of one rank
shared_experts.py  the dense SwiGLU beside them
layer.py       ExpertParallelMLP: all of it behind Megatron's MLP seam
statistics.py  what one step's routing looked like: load, drops, entropy, margin, losses
"""
