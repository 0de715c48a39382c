"""What says that units correspond: cross-moments of every space, of weights or of activations."""
