"""Images out of a trained model: samples at temperatures, the latents opened, files of latents, pictures."""
