"""The `jaxaroo` command: the only floor that knows both training and inference.

main.py        which command is which, and how failures are told
output.py      what commands share: exit by misuse, JSON
generate.py    continue prompts
files.py       convert, quantise and describe checkpoints
train.py       begin and resume runs
rl.py          a policy learns from rewards of its own answers
rounds.py      generation and training by turns
vision.py      ResNet-20 at several widths, GhostNetV3
data.py        rows made of other rows: pairs of codes, stages, mixtures, refusals, shortened solutions
label.py       solutions to learn from, and how good their steps are
evaluate.py    perplexity, right answers, how good a reward model is and what it chooses
bits.py        what each width of a master is worth
membership.py  whether texts were in a model's training data
bench.py       faster methods beside plain decoding
quickstart.py  two tiny models from nothing
"""
