"""Room `rehearsal`, storey 6: a rank of every kind of a world, built on the meta device without that world.

command.py     what tools/rehearse.py calls
rehearsal.py   which ranks, and the whole of it, in order
rank.py        one rank: groups, bytes, hollow checkpoint files (torch)
files.py       hollow inference files, read back
measured.py    bytes read off built objects (torch)
preload.py     what the fork server imports (torch)
"""
