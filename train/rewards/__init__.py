"""What an answer is worth, from what was found out about it. Nothing here generates or judges answers.

truthrl.py     right, abstained or wrong: three rewards, so that a guess is worth less than silence
critique.py    a critique's two stages: is its verdict right, and does the answer get better
code_tests.py  which codes pass which tests, each pair in a process of its own, with limits
code_child.py  that process
"""
