"""Models that run: the only place where a class is built, and what goes in and comes out of it.

`building` makes the real class of a checkpoint, `live` puts processors beside it, `inputs`, `tokens` and `unlabelled`
make its inputs, `scores` what it gives on a task. `taps` finds where spaces are seen in it, `probes` runs it there,
`skips` permutes its residual sums by hooks. `reference` and `text_tower` are classes of our own.
"""
