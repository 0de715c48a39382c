"""The algebra of maps: what carries the units of one model onto the units of another.

`algebra` has the kinds of map (identity, permutation, orthogonal, dense, coupling, rectangular, per head),
`collection` all maps of a model, `file` the one they are kept in (moments of inputs have such a file, too), `transport`
the contraction of a tensor with them, `random` drawn ones.
"""
