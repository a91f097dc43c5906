"""The judge's PyTorch half."""
