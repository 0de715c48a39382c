"""What is known of model families: one declarative table each, and the binder that holds it against tensors.

`table` says what a family states of itself; each file in `tables` is one; `registry` finds the family of a checkpoint;
`binding` gives the layout of actual tensor names, shapes and a config.
"""
