"""Shared by the benchmarks.

command.py (switches), timing.py (contenders in turns), process.py (groups, machine), products.py (matrix products of a
step), token_files.py (corpora)
"""
