"""What a competitor's name means, per framework; each module is imported only inside that framework's worker."""
