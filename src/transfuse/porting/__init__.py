"""The run: from three models to a checked and written fourth, with a card and a report."""
