"""What the examples that train share: the loop, its checkpoints, its processes, its command."""
