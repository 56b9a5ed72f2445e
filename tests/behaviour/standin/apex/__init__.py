"""Stands in for NVIDIA's apex, which needs a GPU: the same names and arguments, the arithmetic in torch."""
