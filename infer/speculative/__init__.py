"""Several tokens a forward pass, and the same law of the output. Never imports `train`.

loop.py        draft, verify, commit: the one compiled loop; begin reading here
tree.py        draft trees: their shape, their mask
grow.py        how trees grow from a drafter that reads several nodes at once
draw.py        how logits become drafts, and whose noise that takes
verify.py      which drafts are taken: rules as laws, exact or marked as lossy
stop.py        when to stop drafting
controller.py  never slower: which arm decodes next, learnt from the calls before
drafters/      where drafts come from
settings.py    what a user may ask for
load.py        from there to a drafter and its rule
measure.py     what it is worth, beside plain decoding
"""
