"""Room `resilience`, storey 4: notices trouble and decides. May import config, errors, parallel. No torch.

restarts.py    limits on automatic restarts
signals.py     what signals do to a rank
"""
