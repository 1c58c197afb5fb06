"""Implementations for CPUs in C++ of our own, compiled at first use."""
