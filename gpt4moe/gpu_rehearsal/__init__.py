"""Room `gpu_rehearsal`, storey 6: two training steps of one rank on a fake GPU; what a GPU would refuse, and its costs.

command.py     arguments in, report and exit status out
report.py      the rehearsal as text and as JSON
steps.py       builds the rank, runs the project's own training step on fake tensors (torch)
fake_gpu.py    torch.cuda, Megatron and DeepSpeed told that there is one GPU (torch)
gpu_kernels.py the kernels that a CUDA build of torch would choose (torch)
recorder.py    sees every operation: host syncs, mixed devices, kernels, collectives (torch)
waits.py       the operations for which the host waits, and their answers (torch)
costs.py       bytes and FLOPs of one operation (torch)
roofline.py    bytes and FLOPs -> the MFU ceiling and its parts
places.py      the line of code that an operation comes from
guard.py       builds guard.cpp and loads it before torch is imported
guard.cpp      one CUDA device for autograd
"""
