"""Distributed training of text-embedding models and rerankers on Ray."""

__version__ = "0.1.0"
