"""Where batches come from: bytes -> examples -> batches.

text.py  plain text as token windows, with the small corpus that ships with the package
"""
