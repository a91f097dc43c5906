"""The stopwatch's PyTorch half, imported only in that framework's worker."""
