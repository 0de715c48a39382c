"""Records of a benchmark -> verdicts, tables, figures, one HTML page. Nothing is measured here, no model is opened."""
