"""How many operations the products of a compiled program have, per framework; each imported only in its worker."""
