"""Room `objectives`, storey 3: what training minimizes. Above data, below training; never imports model or moe.

    batch --num_tokens--> the global batch's token count, known before the forward pass
    batch --arguments--> model's forward call --output--> losses --> their sum over the global batch / token count

objective.py   Objective: what the training step calls
next_token.py  next-token prediction, the objective of pre-training
stages.py      stage -> its objective: one row each
"""
