"""Room `resilience`, storey 4: limits on restarts, signals, spikes, hangs. May import config, errors, parallel.
No torch.

recent.py      losses and norms of the last steps; is a new one a spike?
restarts.py    limits on automatic restarts
hangs.py       what ranks say of themselves; who stopped a launch that hangs
standing.py    where a thread stands: collective, group, layer, micro-batch
signals.py     what signals do to a rank
"""
