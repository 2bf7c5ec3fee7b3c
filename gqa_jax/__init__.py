"""Flax NNX modules for grouped-query attention and gated delta linear attention."""
