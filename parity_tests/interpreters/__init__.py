"""Run a framework, or other people's code, in a process of its own.

`process` starts a child, exchanges lines with it, keeps the last of its prints, and ends it with all that it started,
after a time limit at the latest. `interpreter` exchanges JSON messages over it with a Python that runs a module of this
project, started by `__main__`. All need the standard library only.
"""
