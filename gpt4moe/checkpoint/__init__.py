"""Room `checkpoint`, storey 4: bytes that outlive a layout. Imports config, parallel, architecture, data; never model.

    block_cache.py blocks that were read last
    storage.py     one safetensors file, read verified
    writing.py     the same, written
    cover.py       are tensors covered exactly once?
    manifest.py    what a checkpoint holds; the commit
    base.py        the frozen weights beside adapters
    saving.py      a rank's save, in a thread
    index.py       any box of any tensor
    filling.py     blocks of files into torch tensors, by threads
    reader.py      any range, into torch tensors
    selection.py   which tensors a run takes
    health.py      which checkpoints are suspect, and why
    retention.py   which checkpoints exist, which stay
    inspection.py  list, show, verify, compare; as data
    inspection_text.py  the same, as lines

A checkpoint is a set of logical fp32 tensors, KIND/NAME: weights, buffers and the optimizer's states
(config.optimizer_table), cut into rectangles as their writers owned them. No file is written or read with pickle. Only
filling and reader need torch.
"""
