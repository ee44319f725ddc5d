"""From weights and a prompt to text. Never imports `train`.

sampling.py      how to choose the next token
decode.py        prefill and the plain decoding loop: the oracle of every faster method
requests.py      what goes into the engine and what comes out
engine.py        the public Engine
speculative/     several tokens a step, and the same output
guided/          choosing among samples, and steering them, by a reward model's scores
evaluate.py      right answers, votes and pass@k of an engine; perplexity of a model
widths.py        what each width of a master is worth, weighs, and how fast it decodes
step_scores.py   how good every step of a solution is, by a reward model
step_metrics.py  how good such scores are: AUROC, first errors, calibration
membership.py    whether a text was in the training data: probes of hidden states, and simpler ways
"""
