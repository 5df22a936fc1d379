"""Room `checkpoint`, storey 4: bytes that outlive a layout. May import config and parallel; it receives the rest's state.

    storage.py    one safetensors file: streamed out with block hashes, read back verified
    cover.py      whether stored rectangles cover a tensor exactly once
    manifest.py   what a checkpoint holds; written last, its presence commits
    writer.py     save_checkpoint: every rank writes what it owns, once
    reader.py     CheckpointReader: any flat range of any shard, on any layout
    retention.py  which checkpoints a run folder has, and which stay

A checkpoint is a set of logical fp32 tensors (`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`), cut into rectangles as
their writers owned them. No file is written or read with pickle.
"""
