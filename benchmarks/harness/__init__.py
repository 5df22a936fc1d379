"""What benchmarks stand on: command.py (switches), timing.py (contenders in turns), process.py (groups, machine)."""
