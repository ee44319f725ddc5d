"""Operations: what each means in plain JAX, and in time the kernels that stand beside it.

token_stats.py  log-probability, log-sum-exp and entropy of chosen tokens without [N, V] logits
token_kl.py     divergence of a policy from its reference at every token, likewise
qmm.py          products with quantised matrices at any width: switching, packing, multiplying
"""
