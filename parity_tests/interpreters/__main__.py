"""Enter a child: `python -m parity_tests.interpreters package.module argument ...` runs the module's `main`."""

import sys

# Whatever was named as an interpreter reads this file: it is written so that Python 2 can still read it and say so.
if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write("Python 3.11 or newer is needed, this is Python " + found + "\n")
    sys.exit(2)

from parity_tests.interpreters.interpreter import run

if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
