"""From data to weights. Never imports `infer`: where training needs samples, the caller passes a function.

run.py         a run from its settings to its model, and back to it after a stop; begin reading here
rounds.py      a model learns from its own answers, in rounds
rl.py          online policy gradients: answers, rewards, updates
algorithms.py  which of them there are, and what each makes of answers and rewards
rollouts.py    sampled answers as rows of tokens
vision.py      runs of the vision models
statistics.py  running statistics in a training state
recipe.py      what kinds of runs there are
preference.py  settings of preference training, and what they make of a decoder
curry.py       preference training in stages, from easy to hard
references.py  what the reference says of every row, written down once
qat.py         settings of joint quantisation-aware training, and what they make of a decoder
config.py      settings as YAML, checked
state.py       what changes from step to step
step.py        one jitted step for every objective: loss, gradients, update
optimizer.py   optimisers, schedules, the running mean of parameters
loop.py        windows in, a trained state out
checkpoint.py  state and position in the data, on disk and back
metrics.py     one JSON line a step, and the curve
data/          where batches come from
labels/        where labels of steps come from
objectives/    what is minimised
advantages/    what each token or answer was worth beside what was to be expected
rewards/       what an answer is worth, from what was found out about it
precision/     one master for all widths: what each width learns, and which layer gets which
"""
