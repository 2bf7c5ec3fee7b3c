"""The gated delta rule: linear attention with a decaying, error-correcting state."""
