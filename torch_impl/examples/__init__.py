"""Models in which partitioned linear layers replace a list of linears; each has a twin in the other tree."""
