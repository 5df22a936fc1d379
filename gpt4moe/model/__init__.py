"""Room `model`, storey 3: assembly, no new mathematics. May import config, parallel, moe, megatron.core.

cuts.py               the table of parameters: how each is cut over ranks, its initial value (no torch)
parameters.py         a rank's parameters: logical name and shard, and the marks that Megatron reads
logical.py            the logical tensors of a model, from its configuration (no torch)
weights.py            load_weights: any checkpoint onto any layout
transformer_config.py ModelConfig + parallel degrees -> Megatron's TransformerConfig (the only translation)
attention.py          core attention over scaled_dot_product_attention
recompute.py          a layer that keeps nothing but its input for the backward pass
specs.py              the layer tree: attention, norms, dense or expert-parallel MLP
gpt.py                build_model: one GPTModel per virtual stage of this rank
initialization.py     initial weights, equal on every layout
"""
