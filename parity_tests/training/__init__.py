"""Judge training: K optimiser steps in both frameworks from the same start."""
