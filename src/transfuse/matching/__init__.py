"""Matchers: from evidence to the best element of a group, by coordinate ascent."""
