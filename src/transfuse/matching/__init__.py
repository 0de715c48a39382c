"""From cross-moments to maps: assignment, Procrustes, the two-level step for heads, coordinate ascent, couplings."""
