"""Room `resilience`, storey 4: notices trouble and decides. May import config, errors, parallel. No torch.

restarts.py    a cap on automatic restarts, and the brake on a run that makes no progress between them
signals.py     what a signal means to a rank: in its first moments, while it trains, while it ends
"""
