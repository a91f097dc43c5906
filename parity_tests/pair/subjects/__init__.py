"""The two sides of a pair: the only files of this package, beside the examples, that touch a framework."""
