"""The contract of a family of models, and the families, a folder each."""
