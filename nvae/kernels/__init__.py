"""Triton kernels, one module for each operator that has some. Imported only where Triton runs."""
