"""Source, tuned and target under one set of names: what corresponds, what tuned changed, what becomes of every tensor.

`opening` opens the three and holds them against one layout; `model` is what comes of it. `conform` gives source
target's inputs, `resizing` says what corresponds between other widths and depths, `delta` is the task vector, `folding`
the form in which streams may be rotated, `plan` what happens to each tensor and what the output's config says.
"""
