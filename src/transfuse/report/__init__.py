"""What a benchmark found, as tables, figures and one page."""
