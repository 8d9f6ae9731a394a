"""Tokens to vectors or scores.

To add a backbone: a row in families.py. To add a pooling: a function and a row in pooling.py.
"""
