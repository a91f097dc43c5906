"""From a task to a callable, per framework; each module is imported only inside that framework's worker."""
