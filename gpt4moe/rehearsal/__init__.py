"""Room `rehearsal`, storey 6: builds a rank of every kind of a large world on the meta device, without that world.

command.py     arguments in, report and exit status out
rehearsal.py   picks the ranks, compares what they hold
rank.py        builds one rank, counts bytes (torch)
files.py       checkpoint and inference files without data
reading.py     which rank reads what of the inference files (torch)
preload.py     imports for the fork server (torch)
"""
