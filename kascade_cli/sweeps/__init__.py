"""The sweeps behind figures 2, 5 and 6 of the paper: one setting after another on the same questions.

plan.py says which settings, kl.py measures the divergence at the answers, document.py is the result file that a sweep
goes on from, run.py runs it.
"""
