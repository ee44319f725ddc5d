"""What a network is, how its weights come and go, what a tokenizer is.

decoder.py      the decoder-only transformer: config, attention, MLP, layer, forward, head
cache.py        the key-value cache: data that goes in and comes out of a forward pass
safetensors.py  read and write the safetensors format
hf.py           Hugging Face checkpoints: import, export, and the checks on the way
tokenizer.py    text to tokens and back, and chat templates
"""
