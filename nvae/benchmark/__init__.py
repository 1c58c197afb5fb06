"""How fast, and with how much memory: what scripts/benchmark.py measures; and what a machine has, for nvae-doctor."""
