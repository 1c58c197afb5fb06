"""What the papers define: layers, cells, flows, latents, likelihoods, penalties; each file reads beside its section."""
