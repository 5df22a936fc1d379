"""Room `moe`, storey 2: the expert-parallel MLP. May import config, parallel, megatron.core, deepspeed's expert parts.

layer.py       ExpertParallelMLP: all of it behind Megatron's MLP seam; recompute, shared experts
routers/       the table of routers: logits -> which experts, with which weight
pool.py        one micro-batch over tp x cp: sums, order, capacity
losses.py      load-balancing and z-loss, attached to the backward pass
plan.py        which assignment goes to which rank, and where its row stands
dispatch.py    tokens -> expert ranks -> tokens (gathers, one all-to-all each way)
expert_rows.py how many rows each expert has; a copy to the host that is awaited later
experts.py     the SwiGLU experts of one rank, on the kernel that its device has
grouped_products.py  rows of several experts times their matrices: grouped, or one product each
per_expert.py  the kernel of CPUs: experts one by one, small ones together
swiglu.py      the weighted activation and its gradients
swiglu_kernels.py  the same in Triton, for GPUs
weight_gradients.py  gradients of weights, added to Megatron's fp32 buffers by the products that make them
weight_gradient_kernels.py  the same for all experts at once in Triton, for GPUs
statistics.py  declared once: what is counted, and its metrics (no torch)
"""
