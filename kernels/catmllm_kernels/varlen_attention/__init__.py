"""Causal attention over samples laid end to end."""

from catmllm_kernels.varlen_attention.layout import Prefix, continued
from catmllm_kernels.varlen_attention.op import varlen_attention

__all__ = ["Prefix", "continued", "varlen_attention"]
