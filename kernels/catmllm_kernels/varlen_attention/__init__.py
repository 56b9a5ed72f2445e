"""Causal attention over samples laid end to end."""

from catmllm_kernels.varlen_attention.op import varlen_attention

__all__ = ["varlen_attention"]
