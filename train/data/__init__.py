"""Where batches come from: bytes -> examples -> tokens -> batches.

formats.py     rows on disk, of every layout, checked
tokenise.py    an example as tokens, and which of them are learned
steps.py       solutions as steps, and steps as tokens with labels
pipeline.py    shuffled, packed or padded batches, and a position to return to
curriculum.py  pairs from easy to hard (Curry-DPO), mixtures of sources (DMT)
dualformer.py  solutions with part of their reasoning left out, at five levels
ranked.py      pairs from answers that were ranked, by a reward model or by their outcomes
dstc.py        pairs from codes and tests that a model wrote itself
nauf.py        refusals that name whom they are about, questions with names swapped, scores of unlearning
arithmetic.py  the embedded task: word problems, their solutions, a checker of every step, injected slips
images.py      CIFAR-10 from its binary files, augmented, the same again
"""
