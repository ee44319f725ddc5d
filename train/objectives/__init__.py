"""What is minimised; one paper, one file, each a pure function from scores of tokens to terms of the loss.

logprobs.py  the shared forward pass: log-probabilities of targets, for every objective
sft.py       supervised fine-tuning: likelihood of completions
"""
