"""Benchmarks: `python -m benchmarks.run` measures, `python -m benchmarks.report` alone writes tables and plots."""
