"""Models on data, around ports: training, few labels, the scale of a task vector, the line between two models."""
