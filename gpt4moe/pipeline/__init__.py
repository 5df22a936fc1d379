"""Room `pipeline`, storey 2: the pipeline schedule as data. No torch.

schedule.py        slots, time axis, bubble, live activations
messages.py        every send and receive, in Megatron's order
message_check.py   finds crossed messages and deadlocks
"""
