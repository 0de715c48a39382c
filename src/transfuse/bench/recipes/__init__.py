"""Recipes: benchmarks as files.

`spec` says what one may hold, `reading` reads it; beside them lie those that come with the package.
"""
