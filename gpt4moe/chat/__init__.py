"""Room `chat`, storey 3: conversations as tokens and a mask of what is learned. Above data; never imports model.

    line --rows--> messages --template--> text, assistant's parts --encode--> tokens, mask --source--> shards

rows.py      chat lines of three forms -> messages, checked
template.py  a chat template: rendered, and where its assistant speaks
encode.py    conversation -> tokens and their mask
words.py     tokenizer with template: a folder of Hugging Face's files
source.py    files of chat lines -> a source of a data folder
command.py   what tools/prepare_chat.py answers

Runs without torch, but for source.py's split by hash. Called by inference (templates), convert, demo, tools.
"""
