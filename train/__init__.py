"""From data to weights. Never imports `infer`: where training needs samples, the caller passes a function.

step.py  the training state, and one jitted step: loss, gradients, update
loop.py  batches in, a trained state out
data/    where batches come from
"""
