"""The one place that holds the version: `pyproject.toml` reads it, and so do reports and cards."""

__version__ = "0.1.0"
