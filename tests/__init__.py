"""Tests mirror the tree; `oracles` holds the references that we did not write."""
