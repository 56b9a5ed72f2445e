"""Decoding: engines, nucleus, grammar."""
