"""Implementations for GPUs in Triton."""
