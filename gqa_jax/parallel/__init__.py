"""Models on a mesh: which axis splits what, tensor parallelism, context parallelism."""
