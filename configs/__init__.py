"""Hydra configuration: the YAML files and, beside them, resolvers, checks before a run, messages and run folders.

`train.py` and `eval.py` import this package; `condconv`, `models` and `data` never do.
"""
