"""Back ends of the attention op, one file each. `vicinal.backends` chooses among them."""
