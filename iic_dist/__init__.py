"""Distributed training for Invariant Information Clustering with a contrastive head."""

__version__ = "0.1.0"
