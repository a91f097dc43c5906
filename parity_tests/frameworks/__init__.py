"""Everything of the judge that touches a framework, in a folder named after it; each is imported on use."""
