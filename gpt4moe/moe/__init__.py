"""Room `moe`, storey 2: the expert-parallel MLP. May import config, parallel, megatron.core, deepspeed's expert parts.

layer.py       ExpertParallelMLP: all of it behind Megatron's MLP seam; recompute, shared experts
routers/       the table of routers: logits -> which experts, with which weight
pool.py        one micro-batch over tp x cp: sums, order, capacity
losses.py      load-balancing and z-loss, attached to the backward pass
dispatch.py    tokens -> expert ranks -> tokens (DeepSpeed's split plan, gathers, one all-to-all each way)
experts.py     the SwiGLU experts of one rank, on the kernel that its device has
per_expert.py  the kernel of CPUs: experts one by one, small ones together
swiglu.py      the weighted activation and its gradients
swiglu_kernels.py  the same in Triton, for GPUs
weight_gradients.py  gradients of weights, added to Megatron's fp32 buffers by the products that make them
weight_gradient_kernels.py  the same for all experts at once in Triton, for GPUs
statistics.py  declared once: what is counted, and its metrics (no torch)
"""
