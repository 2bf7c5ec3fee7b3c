"""Attention in tiles with online softmax: O(T) memory forward and backward, any XLA device."""

from pallas_kernels.attention.blockwise.passes import backward as backward
from pallas_kernels.attention.blockwise.passes import forward as forward
