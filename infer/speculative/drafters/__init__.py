"""Where drafts come from; each file makes a `Drafter` (`../loop.py`).

lookup.py       the text so far, where its last words stood before (prompt lookup)
aded.py         tri-grams of a corpus and of the text so far, and a search among them
small_model.py  another decoder with the same tokenizer
eagle.py        one layer on the target's last hidden states; also what every drafter of that kind shares
jakiro.py       two experts on them
kangaroo.py     the target's own first layers, and an adapter
"""
