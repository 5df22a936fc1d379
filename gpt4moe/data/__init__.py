"""Room `data`, storey 2: the n-th sample of a run, exactly, on whichever rank asks. Never imports moe or model.

    text --tokenizer, preprocess--> .bin/.idx --indexed--> tokens --packing, mixture--> n-th sample --loader--> Batch

    tokenizer.py    train, load, encode, decode a byte-level BPE
    preprocess.py   documents -> .bin/.idx and manifest (the only file here with megatron.core)
    manifest.py     manifest.json: what a data folder holds
    indexed.py      memory-mapped reader of .bin/.idx
    permutation.py  shuffle of range(n) without memory
    mixture.py      which source and sample is the n-th
    packing.py      sample i of a token stream
    mock.py         synthetic samples, no files
    sampler.py      samples of a rank's micro-batches
    batch.py        Batch: what a forward pass gets
    check.py        data of a run: found, fitting, identity
    loader.py       build_data: train and validation streams

All but batch.py, loader.py and preprocess.py run without torch. Called by training, inference (tokenizer), demo, tools.
"""
