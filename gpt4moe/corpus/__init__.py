"""Room `corpus`, storey 3: files of text -> sources of a data folder. No torch.

    files --inputs--> pieces --records, decontamination, fill_in_the_middle, encoder--> token files --> shards, manifest

    command.py             the options of tools/tokenize_corpus.py, and what it does with them
    inputs.py              files of a source by kind, cut into pieces
    records.py             documents of jsonl, parquet, text, source trees; every way in which they can be bad
    compressed.py          gzip and zstd as streams
    sample.py              first documents here and there, to check and to train a tokenizer on
    encoder.py             gigatoken where it is proved equal, else tokenizers
    foreign.py             sentencepiece's and tiktoken's files as a tokenizer.json
    piece.py               one piece: documents in, token files out
    decontamination.py     documents with words of an evaluation file
    duplicates.py          equal documents, on disk
    fill_in_the_middle.py  code whose middle comes last
    quality.py             unknown tokens, entropy: is it language?
    assemble.py            pieces -> shards of Megatron's format
    workers.py             tasks on several processes
    build.py               a source: planned, made, gone on with
    unfinished.py          the work that is under way: lock, plan, finished pieces
    extend.py              new shards for a source that is there
    grown_tree.py          the new files of a source tree that was read before
    result.py              its manifest; it is moved in place

Called by tools/tokenize_corpus.py.
"""
