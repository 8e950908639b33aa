"""Measure distckpt, its peers and the limit of the hardware in one run.

``python -m distckpt.bench --help`` says how. ``distckpt bench`` measures one disk with it,
and imports it only then; nothing else in the package imports this.
"""
