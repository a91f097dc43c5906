"""The judge's JAX half."""
