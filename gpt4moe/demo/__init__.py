"""Room `demo`, storey 6: what `make data` and `make train` do beyond training. May import every room below.

corpus.py   text of this machine -> data/demo
sources.py  the text, with its licences
entropy.py  unigram and bigram entropies of data
story.py    `make train`: train, kill, resume, summarize
exercises.py  questions with answers, for `make sft`
pictures/     what `make vision` teaches and asks: shapes, words, clips, new words; drawn from a seed
finetune.py   `make sft`: examined, fine-tuned, examined again
summary.py  held-out loss, expert load, export, samples
"""
