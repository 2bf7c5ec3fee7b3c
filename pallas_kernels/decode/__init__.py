"""Attention of a few new tokens over a head-major cache."""
