"""Kinds of routers, one a file: how logits become experts and weights. moe/router.py has the table.

base.py           Router (matrix, noise, fp32 buffers), Routing, Choice
topk.py           softmax, renormalised over the chosen (Mixtral)
switch.py         the best expert, weighted by its raw probability (Switch Transformer)
sigmoid_bias.py   sigmoid scores and a bias that balances the load (DeepSeek-V3)
group_limited.py  the same among a token's best groups of experts (DeepSeek-V3)
"""
