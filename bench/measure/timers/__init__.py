"""One timer per framework; each is imported only inside that framework's worker."""
