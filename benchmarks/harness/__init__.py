"""Shared by the benchmarks: command.py (switches), timing.py (contenders in turns), process.py (groups, machine)."""
