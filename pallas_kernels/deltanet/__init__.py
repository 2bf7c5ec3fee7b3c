"""Gated DeltaNet between its projections: convolution, gates and delta rule of a decode step in one kernel."""
