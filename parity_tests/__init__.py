"""The parity judge: proves that implementations of one linear map, in two frameworks, compute the same function."""
