"""What a network is, how its weights come and go, what a tokenizer is.

decoder.py      the decoder-only transformer: config, attention, MLP, layer, forward, head
cache.py        the key-value cache, as floats or codes of 8 or 4 bits: data that goes in and out of a forward pass
safetensors.py  read and write the safetensors format
hf_config.py    config.json of Hugging Face, into a DecoderConfig and back
hf.py           Hugging Face checkpoint folders: import, export, and the checks on the way
lora.py         low-rank adapters, as a transform of the parameters
quantise.py     a weight at a width below its int8 master, with its gradient; scales and how they start
multi_precision.py  the same for a tree: rules, learned scales, master codes, what serves at any width
ptq.py          quantise a trained model without training: nearest codes, GPTQ, LoRC; calibration layer by layer
llm_fp4.py      LLM-FP4: floats of 4 or 8 bits with a real exponent bias, found by search
repquant.py     RepQuant: one scale for a norm's outputs instead of one a channel; softmax on powers of the root of 2
qwix_interchange.py  single-width weights to and from Qwix (optional)
presets.py      the sizes of known models
eagle.py        EAGLE's drafter
jakiro.py       Jakiro's: two experts
kangaroo.py     Kangaroo's: an adapter on the first layers
vision.py       what the two vision networks share: convolution, batch norm, folders
resnet.py       ResNet for small images, at several widths from one master
ghostnet.py     GhostNetV3: branches in training, one kernel in use
heads.py        heads on hidden states: will this draft be accepted, is this token good
checkpoint.py   folders of small networks that stand beside a target
tokenizer.py    text to tokens and back, and chat templates
"""
