"""What `make vision` teaches and asks: pictures drawn here, from a seed. Part of the room demo.

drawing.py   shapes, pairs of shapes, words on a small web page, clips; as RGB bytes
items.py     five kinds of items: pictures, and what is said of them
splits.py    what is learned, what is read while training, what is asked
texts.py     texts without pictures, and a tokenizer of them
sheet.py     many pictures with their texts as one PNG
make.py      items -> tars to learn from, held-out items to be asked; the command
"""
