"""Shared by the benchmarks.

command.py (switches), timing.py (contenders in turns), process.py (groups, machine), products.py (matrix products of a
step), peers.py (the same step by other stacks), same_weights.py (for peers), token_files.py (corpora)
"""
