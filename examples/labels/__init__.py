"""Labels for points: what `examples.label_points` is made of."""
