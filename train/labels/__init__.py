"""Where labels of steps come from. Nothing here generates text or checks answers: the caller passes functions.

monte_carlo.py    how often a completer that goes on from a step gets it right: a job that can be killed
consistency.py    labels that a weak and a strong completer, or a completer and a judge, agree on
truth.py          labels that are known: of the embedded task, and outcomes of published solutions
adaptive_step.py  where a policy was unsure, a step begins
feedback.py       what is said of each step, as examples that come before labels
"""
