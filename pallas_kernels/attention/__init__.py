"""Grouped-query softmax attention."""
