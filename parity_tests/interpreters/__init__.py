"""The one way to a framework, or to other people's code, in a process of its own.

`process` is the parent's end: it starts a child, speaks to it in lines, keeps the last of what it prints, and ends it
with all that it started, after a time limit at the latest. `interpreter` speaks JSON messages over it with a Python
that runs a module of this project; `child` is the other end, started by `__main__`. All need the standard library only.
"""
