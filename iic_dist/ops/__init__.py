"""Tensor functions without ranks, settings or files: native ops with their twins, random numbers, exact functions."""
