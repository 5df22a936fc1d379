"""Room `demo`, storey 6: what `make data` and `make train` do beyond training. May import every room below.

corpus.py   text of this machine -> data/demo
sources.py  the text, with its licences
entropy.py  unigram and bigram entropies of data
story.py    `make train`: train, kill, resume, summarize
exercises.py  questions with answers, for `make sft`
pictures/     what `make vision` teaches and asks: shapes, words, clips, new words; drawn from a seed
finetune.py   `make sft`: examined, fine-tuned, examined again
seeing.py     `make vision`: text, encoder, the vision stage, examined
contrastive.py  the image encoder of `make vision`, trained by captions
seeing_exam.py  held-out items: seen, shuffled, with gates at 0
seeing_answers.py  asks a vision model, counts what is right
seeing_sheet.py  answers as pictures: which patches each word came from
made_of.py    what a folder of `make vision` was made of; another is refused
commands.py   the project's own commands, one after another or side by side
summary.py  held-out loss, expert load, export, samples
"""
