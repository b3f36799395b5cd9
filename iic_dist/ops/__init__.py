"""Tensor functions without ranks, settings or files: the native ops with their PyTorch twins, random numbers, exact functions."""
