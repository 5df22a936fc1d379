"""What benchmarks stand on: timing.py (contenders in turns), process.py (one process's groups, the machine)."""
