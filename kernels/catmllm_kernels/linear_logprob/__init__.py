"""Per-token log-probability straight from hidden states."""

from catmllm_kernels.linear_logprob.op import LogProbs, linear_logprob, linear_logprobs
from catmllm_kernels.linear_logprob.reference import IGNORED

__all__ = ["IGNORED", "LogProbs", "linear_logprob", "linear_logprobs"]
