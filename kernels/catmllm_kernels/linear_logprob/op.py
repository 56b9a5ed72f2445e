"""The public op: one function, whatever the device."""

from catmllm_kernels.linear_logprob.reference import linear_logprob

__all__ = ["linear_logprob"]
