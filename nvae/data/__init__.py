"""From images as people have them to batches: sets by name, own images, prepared stores, loading."""
