"""Room `media`, storey 3: documents with images as a source of a data folder. Above data; never imports model.

    files --inputs, tars--> items --forms--> texts, images --examine--> whole ones --source--> tokens, images

forms.py     a line or sample of several forms -> texts and names of images, checked
inputs.py    jsonl, folders and WebDataset tars -> items, each with a way to its images' bytes
tars.py      the samples of a tar (webdataset)
examine.py   the images of items, read and decoded in threads; bad ones are told
source.py    items -> shards of tokens and images, what was left out, the manifest
command.py   what tools/prepare_media.py answers

Runs without torch, but for tars.py: webdataset imports it. Reading is data's (image_files.py, image_rows.py). Called by
demo, tools.
"""
