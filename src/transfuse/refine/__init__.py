"""Steps that adapt a transported task vector to a few labelled examples at the target."""
