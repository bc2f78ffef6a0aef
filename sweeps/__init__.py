"""Sweeps: many trainings from one command, that can be stopped at any time and go on where they stopped.

`plan` says which jobs there are, `names` what they are called, `jobs` how one is run and how its folder says how it
stands, `launchers` where jobs run, `display` what people see, `sweeper` puts these together, `search` is the search for
hyperparameters. Hydra finds the sweepers in `hydra_plugins`, as it must. docs/sweeps.md is for users.
"""
