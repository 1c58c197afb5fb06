"""The vector-quantised family: VQ-VAE, VQ-VAE-2, and their learned PixelSNAIL priors."""
