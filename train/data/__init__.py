"""Where batches come from: bytes -> examples -> batches.

text.py        plain text as token windows, with the small corpus that ships with the package
arithmetic.py  the embedded task: word problems, their solutions, a checker of every step, injected slips
"""
