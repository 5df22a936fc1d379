"""Room `resilience`, storey 4: limits on restarts, signals, spikes. May import config, errors, parallel. No torch.

recent.py      losses and norms of the last steps; is a new one a spike?
restarts.py    limits on automatic restarts
signals.py     what signals do to a rank
"""
