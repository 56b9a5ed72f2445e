"""Per-token log-probability straight from hidden states."""

from catmllm_kernels.linear_logprob.allowed import Allowed, allowed_logprobs, masked_logits
from catmllm_kernels.linear_logprob.op import LogProbs, linear_logprob, linear_logprobs
from catmllm_kernels.linear_logprob.reference import IGNORED

__all__ = [
    "IGNORED",
    "Allowed",
    "LogProbs",
    "allowed_logprobs",
    "linear_logprob",
    "linear_logprobs",
    "masked_logits",
]
