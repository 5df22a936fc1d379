"""Room `architecture`, storey 2: what a model is made of, from its configuration alone. No torch.

names.py      what tensors are called
rows.py       a row of the table
table.py      the table: every tensor
encoder_folder.py  an image encoder's folder, checked
vision.py     rows of the resampler and of gated blocks
adapters.py   rows of LoRA adapters
tensors.py    the tensors of one model
count.py      parameters: whole, active, of a rank
flops.py      operations of a token, row by row
image_flops.py  parameters and operations of what images pass
trained.py    what a run trains
cache.py      what decoding keeps of a token

May import config and parallel's arithmetic.
"""
