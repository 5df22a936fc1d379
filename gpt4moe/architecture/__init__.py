"""Room `architecture`, storey 2: what a model is made of, from its configuration alone. No torch.

tensors.py    every tensor of a model: name, shape, cut
cuts.py       how each parameter is cut over ranks, its initial value
logical.py    logical tensors and buffers, by name
count.py      parameters: whole, active, of a rank
flops.py      operations of a token, row by row

May import config and parallel's arithmetic.
"""
