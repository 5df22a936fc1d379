"""Room `inference`, storey 5: tokens out. May import config, model, checkpoint, parallel and data; never training.

load.py        a checkpoint's weights in one process, whatever layout wrote them
generation.py  next tokens by plain sampling (no cache)
samples.py     prompts in, text out, with the tokenizer of the run
"""
