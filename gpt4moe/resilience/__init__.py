"""Room `resilience`, storey 4: limits on restarts, and signals. May import config, errors, parallel. No torch.

restarts.py    limits on automatic restarts
signals.py     what signals do to a rank
"""
