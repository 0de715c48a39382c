"""The algebra of maps: what carries the units of one model onto the units of another.

`algebra` has the kinds of map (identity, permutation, orthogonal, dense, coupling, rectangular, per head),
`collection` all maps of a model and their file, `transport` the contraction of a tensor with them, `random` drawn ones.
"""
