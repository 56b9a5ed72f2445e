"""Operators of the training stack, a folder each; imports torch and triton, never catmllm."""
