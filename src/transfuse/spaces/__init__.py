"""The grammar of spaces: which set of units every axis of a tensor belongs to, and which group may move it.

`axes` parses `mlp.0 <- stream` and checks it against a shape. `layout` holds the spaces of a whole model and the axes
of each of its tensors, and ties spaces to each other. Nothing here knows a file, a family or a model class.
"""
