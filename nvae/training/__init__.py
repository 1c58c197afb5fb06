"""A run: its config, its state, the loop, its folder, and what it shows on the way."""
