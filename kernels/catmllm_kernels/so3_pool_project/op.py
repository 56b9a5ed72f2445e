"""The public op: one function, whatever the device."""

from catmllm_kernels.so3_pool_project.reference import so3_pool

__all__ = ["so3_pool"]
