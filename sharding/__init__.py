"""Where arrays live. The lowest floor: nothing here knows what a model is.

rules.py     logical axes of weights and activations -> axes of the device mesh
mesh.py      the device mesh, several processes, batches from hosts onto devices and back
topology.py  compile for a chip that is not here; what its kernels move and hold
"""
