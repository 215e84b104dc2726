"""A deterministic toy world, and the two tiny models, on which the whole pipeline learns on a CPU."""
