"""Judge one layer: cases, inputs, the oracle, error bounds, exact checks, and the comparison with what came back."""
