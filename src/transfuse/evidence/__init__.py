"""What says that units correspond: moments of weights or activations; how bases are related; the null test."""
