"""Competitors that are modules of public libraries: each is fed with the given arrays in place of its own parameters.

A library is imported when its competitor is asked for: a worker without it measures the others.
"""
