"""Choosing among samples, and steering them, by the scores of a reward model. Never imports `train`.

best_of_n.py     from step scores to one solution: aggregates, the best of n, votes, and what k samples are worth
step_beam.py     search over partial answers, step by step
deal.py          the same with a reward function of the user's that looks ahead
value_guided.py  a reward model chooses among the likeliest tokens, inside the compiled loop
settings.py      what a user says about that;  load.py  a guide from it
"""
