"""The Very Deep VAE (Child 2021): network, and the published code's checkpoints."""
