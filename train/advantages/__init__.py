"""What each token or answer was worth beside what was to be expected, from rewards; no gradient passes through it.

grpo.py         beside the other answers to the same question, in units of their spread; also what groups share
rloo.py         beside the mean of the others
tempo.py        GRPO, and at tokens where the answers of a group part, what parting was worth
gae.py          beside a value model, token by token: PPO's rewards of tokens, advantages and returns
constrained.py  several rewards, each held at its threshold by a multiplier that is learnt
"""
