"""Room `demo`, storey 5: what `make data` and `make train` do beyond training. May import every room below.

corpus.py   text and code of this machine -> data/demo, ready to train on
sources.py  which files of this machine are text, whose, under which licence
roff.py     manual page source -> readable text
story.py    what `make train` tells: train, kill, resume, sum up
export.py   Hugging Face format, checked; samples from it
summary.py  held-out loss, load per expert, samples, report
entropy.py  unigram and bigram entropies of a data folder
"""
