"""How one master is trained for all its widths, and which layer gets which width. Pure functions.

joint.py     which widths a step takes, and what each of its updates changes
alrs.py      each width has its own learning rate and its own moments for the scales that all of them share
distill.py   a narrow model learns from the widest one, or from the float model
hessian.py   how sensitive a layer is: the trace of its Hessian, by random signs
hasb.py      layers draw widths of their own, sensitive ones wide ones more often
bit_plan.py  the best width for every layer under a budget
layers.py    numbers of each layer, from a tree with layers stacked or as a tuple
"""
