"""What a decoder layer does between its matrix products: RMSNorm, rotary embedding, SwiGLU."""

from catmllm_kernels.decoder.op import fits, rms_norm, rotate, swiglu

__all__ = ["fits", "rms_norm", "rotate", "swiglu"]
