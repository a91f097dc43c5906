"""What ran during one call, by each framework's own tracer; each module is imported only inside that worker."""
