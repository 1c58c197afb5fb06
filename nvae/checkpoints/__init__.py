"""Weights on disk: our format, the door through which every checkpoint loads, conversion to foreign formats."""
