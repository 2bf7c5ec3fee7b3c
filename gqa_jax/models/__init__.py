"""A hybrid decoder: its layers, generation, sampling, and the memory it needs."""
