"""Room `serving`, storey 6: an endpoint of OpenAI's form, for trying a model on its training layout. May import
inference, convert, runlog (printed errors), checkpoint and parallel.

messages.py    chats and their images as one prompt
bad_request.py what a client did wrong
fields.py      bodies of the API in, requests out; what is not supported is refused by name
answers.py     texts out in the form of the API, whole or piece by piece
desk.py        between HTTP and the ranks: the queue of rank 0
engine.py      all ranks generate what the desk of rank 0 hands out
http.py        the routes
signals.py     Ctrl-C and TERM end the server
command.py     the command of tools/serve.py
"""
