"""Show results and write files: terminal, page, JUnit, drawings; text from outside stays text."""
