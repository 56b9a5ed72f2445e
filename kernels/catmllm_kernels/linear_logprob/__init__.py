"""Per-token log-probability straight from hidden states."""

from catmllm_kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_logprob"]
