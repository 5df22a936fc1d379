"""Room `inference`, storey 5: tokens out. May import config, model, chat, checkpoint, parallel, data; never training.

load.py        a folder's model on any layout
logits.py      a folder's logits in this process; transformers' too
requests.py    what is asked for, what is answered
pictures.py    an image of a prompt
sight.py       prompts with images, read and checked
generation.py  requests in, texts out, on any layout
intake.py      texts that wait, texts that arrive
drawing.py     drawn on one rank, known to all of the copy
sampling.py    the next token from logits
copies.py      copies of the model that step together
batch.py       the new tokens of all rows, packed
cache.py       keys and values in blocks
cache_room.py  the cache shared out to texts and images
image_cache.py keys and values of images, made once
attention.py   a step's tokens attend to their rows
stages.py      a step through all pipeline stages
text.py        a folder's tokenizer, end tokens, chat template
files.py       prompts and answers as jsonl; resumed
writing.py     prompts of a command in, answers out, in order
command.py     the command of tools/generate.py
"""
