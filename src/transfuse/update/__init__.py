"""What is added to target: the task vector carried over, or what fitting and training found, tensor by tensor."""
