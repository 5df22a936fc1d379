"""Room `resilience`, storey 4: notices trouble and decides. May import config, errors, parallel. No torch.

restarts.py    a cap on automatic restarts, and the brake on a run that makes no progress between them
"""
