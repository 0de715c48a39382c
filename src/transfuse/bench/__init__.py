"""Benchmarks from a recipe: models made and cached, every method measured, everything written down."""
