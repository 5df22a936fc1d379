"""Room `inference`, storey 5: tokens out. May import config, model, checkpoint, parallel and data; never training.

load.py        a folder's model on any layout
generation.py  prompts in, sampled text out
"""
