"""Room `model`, storey 3: Megatron's GPT model, assembled. May import architecture, parallel, moe, megatron.core.

gpt.py                 build_model: one GPTModel per virtual stage
specs.py               which module plays each part of a layer
gated_attention.py     gated cross-attention to images, the layer behind it
resampler.py           latents of images
vision_encoder.py      the frozen encoder
linear.py              Megatron's linear layers, as specs use them
adapters.py            LoRA: their matrices, what they add
attention.py           core attention over scaled_dot_product_attention
documents.py           attention that stays inside documents
rotary.py              the rotary embedding in one kernel each way
rotary_kernels.py      that kernel in Triton, for GPUs
cross_entropy.py       the loss in one kernel each way
cross_entropy_kernels.py  that kernel in Triton, for GPUs
transformer_config.py  our configuration in Megatron's words
parameters.py          names, shards, initial values, reduction marks
weights.py             weights of a checkpoint onto chunks
"""
