"""Back ends of the attention op, one file each. `vicinal.attention` chooses among them."""
