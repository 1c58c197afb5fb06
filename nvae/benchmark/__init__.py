"""How fast, and with how much memory: what scripts/benchmark.py measures."""
