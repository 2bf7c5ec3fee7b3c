"""What `python -m gqa_jax demo` trains and shows."""
