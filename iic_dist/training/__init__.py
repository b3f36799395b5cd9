"""The course of a run: passes, steps, agreement of the ranks, checkpoints, what is shown."""
