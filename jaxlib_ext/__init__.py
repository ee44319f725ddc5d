"""Operations: what each means in plain JAX, and the kernel beside it where there is one.

dispatch.py        which of the two runs
token_stats.py     log-probability, log-sum-exp and entropy of chosen tokens without [N, V] logits
token_kl.py        divergence of a policy from its reference at every token, likewise
qmm.py             products with quantised matrices at any width: switching, packing, multiplying (TPU kernel)
tree_attention.py  a few queries, or a tree of guesses, over a long cache of floats or codes (TPU kernel)
expert_pair.py     Jakiro's two experts and their mixtures (TPU kernel)
sampling.py        where top-k and top-p cut, without sorting (TPU kernel)
"""
