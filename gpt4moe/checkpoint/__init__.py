"""Room `checkpoint`, storey 4: bytes that outlive a layout. May import config, parallel; it receives the rest's state.

    storage.py     one safetensors file: streamed out with block hashes, read back verified
    cover.py       whether stored rectangles cover a tensor exactly once
    manifest.py    what a checkpoint holds; written last, its presence commits
    writer.py      every rank writes what it owns, once; the first rank commits
    saving.py      Save: a rank's part of a save, in a thread
    staging.py     the host copy that is written while training goes on
    index.py       CheckpointIndex: where each piece lies; any box of any tensor
    reader.py      CheckpointReader: any flat range of any shard, on any layout, into torch tensors
    selection.py   what a new run takes from a checkpoint
    retention.py   which checkpoints a run folder has, and which stay
    inspection.py  list, show, verify and compare checkpoints

A checkpoint is a set of logical fp32 tensors (`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`), cut into rectangles as
their writers owned them. No file is written or read with pickle. Only staging and reader need torch.
"""
