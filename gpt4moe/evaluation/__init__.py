"""Room `evaluation`, storey 6: a model's scores. May import inference, convert and what lies below them;
never training: train.py hands its probes to the loop.

scoring.py     log-probabilities of given tokens, on any layout
pieces.py      long texts and questions cut to the context
corpus.py      loss, perplexity, bits per byte of each source
interleaved.py sources with images, document by document
questions.py   multiple choice and exact match from jsonl
tasks.py       what training.evaluate_tasks names
in_loop.py     probes of a run that trains: texts, tasks
harness.py     the model of lm-evaluation-harness; imports lm_eval
results.py     what is printed: a table, or JSON
command.py     the command of tools/evaluate.py
"""
