"""The stopwatch's JAX half, imported only in that framework's worker."""
