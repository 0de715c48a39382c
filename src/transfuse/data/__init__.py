"""Tasks and data sets, by description: what is measured, on which rows, read from local files or the hub.

`tasks` describes a task, `splits` reads its rows, `transforms` changes images, `extras` explains what is not installed.
"""
