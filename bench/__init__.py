"""The stopwatch: every implementation of both frameworks, and what users write instead, timed against each other."""
