"""Room `refinement`, storey 7: better texts by search. May import inference, evaluation, pages, runlog and data.

tasks.py       tasks, templates
search.py      rounds: draw, score, keep the best
scorers.py     likelihood, majority, checker, command
outside.py     scores from other processes, with a time limit
checker.py     the process of a checker
trace.py       every candidate as jsonl; resumed
summary.py     a search in numbers
page.py        a search as a page
command.py     the command of tools/refine.py
checkable.py   a set with known answers, made from a seed
comparison.py  pass@1, pass@16, majority, best-of-16, refine-16 at equal tokens
"""
