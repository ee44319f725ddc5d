"""Operations: what each means in plain JAX, and in time the kernels that stand beside it.

token_stats.py  log-probability, log-sum-exp and entropy of chosen tokens without [N, V] logits
qmm.py          products with quantised matrices at any width: switching, packing, multiplying
"""
