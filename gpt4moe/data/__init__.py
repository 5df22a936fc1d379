"""Room `data`, storey 2: the n-th sample of a run, the same on every rank. Never imports moe or model.

    text --tokenizer, preprocess--> .bin/.idx --indexed--> tokens --samples, mixture--> n-th sample --loader--> Batch

    tokenizer.py    byte-level BPE: train, load, encode, decode
    preprocess.py   documents -> .bin/.idx and manifest (megatron.core)
    manifest.py     manifest.json: what a folder holds
    indexed.py      memory-mapped reader of .bin/.idx
    permutation.py  shuffle of range(n) without memory
    mixture.py      source and position of sample n
    samples.py      one sample: packed tokens, or synthetic
    batch.py        Batch: one micro-batch of a rank
    check.py        data of a run: present, fitting, identity
    loader.py       build_data: streams, micro-batches of a rank
    prefetch.py     the next step's batches, made in a thread

All but batch.py, loader.py, prefetch.py and preprocess.py run without torch. Called by training, inference (tokenizer),
demo, tools.
"""
