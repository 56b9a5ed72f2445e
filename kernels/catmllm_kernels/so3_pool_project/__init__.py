"""From equivariant node embeddings to the vectors that a language model reads."""

from catmllm_kernels.so3_pool_project.op import so3_pool, so3_pool_project

__all__ = ["so3_pool", "so3_pool_project"]
