"""Room `inference`, storey 5: tokens out. May import config, model, checkpoint, parallel and data; never training.

load.py        a model's weights in one process, whatever layout wrote them
huggingface.py a Hugging Face folder in transformers, strictly
logits.py      token ids in, logits out, of any of these
generation.py  next tokens by plain sampling (no cache)
samples.py     prompts in, text out, with the tokenizer of the run
"""
