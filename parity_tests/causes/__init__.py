"""Search for the likely cause of a mismatch by trying known mistakes."""
