"""What the attention's kernels cost on a GPU, by count: compiled code, and a scene's tiles."""
