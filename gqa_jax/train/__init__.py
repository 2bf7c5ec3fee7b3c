"""Training: the jitted step, checkpoints, adapters, and aids (QK-clip, recomputation, replica check)."""
