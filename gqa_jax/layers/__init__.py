"""Modules: attention, Gated DeltaNet, feed-forward blocks, and the parts they are made of."""
