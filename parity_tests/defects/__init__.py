"""Plant defects in correct code and count how many the judge notices."""
