"""Measure distckpt, its peers and the limit of the hardware in one run.

``python -m distckpt.bench --help`` says how. Nothing else in the package imports this.
"""
