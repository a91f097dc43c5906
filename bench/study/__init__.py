"""Pure functions over records: statistics and rankings. Measures nothing, imports no framework."""
