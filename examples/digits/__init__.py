"""Finding handwritten digits on large canvases: what `examples.detect_digits` is made of."""
