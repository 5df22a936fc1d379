"""Room `data`, storey 2: the n-th sample of a run, the same on every rank. Never imports moe or model.

    text --tokenizer, preprocess--> shards --catalogue--> tokens --samples, mixture--> n-th sample --loader--> Batch

    lines.py        jsonl, checked line by line
    tokenizer.py    byte-level BPE: train, load, encode, decode
    folder.py       a source is written beside the others
    in_place.py     it is moved in place, whatever a kill leaves
    preprocess.py   documents -> shards of a source (megatron.core)
    blend.py        shares, samples and epochs of each source in a run
    manifest.py     manifest.json of a folder and of a source
    blocks.py       files in blocks, checked as they are read
    indexed.py      memory-mapped reader of one pair of .bin/.idx
    shards.py       a source's tokens over all shards, blocks checked
    catalogue.py    the sources of data folders
    overview.py     what a run reads of each source, also of a plan
    register.py     files of Megatron-LM as a source
    source_command.py  options and answer of the tools that make sources
    command.py      what tools/mixture.py answers
    progress.py     bar of bytes, MB/s and the time that is left
    lookup.py       where sample n comes from; are the files whole?
    permutation.py  shuffle of range(n) without memory
    mixture.py      source and position of sample n
    mixed.py        samples of a mixture of streams: one, or a step's as arrays
    indexed_writer.py  writer of such a pair
    origins.py         file and line of each conversation
    rows.py         documents packed into rows; the n-th row of a mixture
    conversations.py   conversations in rows, with their masks
    image_rows.py   documents with images in rows, with what may look at which
    pictures.py     encoded images: examined, and decoded to one size (Pillow)
    image_tokens.py    text with image tags -> tokens; an image token for a tokenizer
    image_files.py  images in shards, and at which tokens they stand
    mock_images.py  synthetic samples with images
    samples.py      one sample: packed tokens, or synthetic
    batch.py        Batch: one micro-batch of a rank
    check.py        data of a run: present, fitting, identity
    loader.py       build_data: streams, micro-batches of a rank
    passed_over.py  samples that a run went back from and does not read
    prefetch.py     the next step's batches, made in a thread

All but batch.py, loader.py, lookup.py, prefetch.py and preprocess.py run without torch. Called by training, inference
(tokenizer), demo, launch, tools.
"""
