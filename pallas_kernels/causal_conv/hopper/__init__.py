"""Pallas Mosaic GPU kernels of this operator for compute capability 9.0 (H100, H200)."""
