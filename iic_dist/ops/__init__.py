"""The native ops and their PyTorch twins: one op, one file, no collectives."""
