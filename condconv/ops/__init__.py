"""Algorithms for the per-example convolution: one file each, one signature, one registry."""
