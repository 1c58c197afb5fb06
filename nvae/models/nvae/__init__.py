"""NVAE (Vahdat & Kautz 2020): network, objective, and the published code's checkpoints."""
