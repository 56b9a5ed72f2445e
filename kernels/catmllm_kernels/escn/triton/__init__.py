"""The edge path in Triton: seven kernels around plain matrix products. Layouts: layout.py,
meaning: reference.py.

Forward    gather.py       producer: gather both ends, rotate, cut to |m| <= mmax, radial scale, pack by m
           product.py      first SO(2) product with the activation (activation.py) as its epilogue
           softmax.py      LayerNorm, SmoothLeakyReLU, dot, softmax over the edges of a target
           scatter.py      consumer: attention weight, rotate back, sum over a target's edges in their order
Backward   scatter.py      value_grad: of the consumer, to values and attention
           activation.py   activation_grad
           softmax.py      softmax_grad
           gather.py       again, for the rows, and the radial weights' gradient in one pass over the nodes
           scatter.py      again, over the edges at both ends of a node

message.py calls them in this order; each file holds a kernel beside the function that launches it. What has
no epilogue worth fusing (the second product, the attention's scalars, gradients of weights and rows, the last
radial layer) is torch's own product. Nothing is added by atomics: sums run in the order of the graph, so
equal inputs give equal bits. Arithmetic outside the products is float32 (the softmax of float32 inputs
float64).
"""

import torch

from catmllm_kernels.escn.triton.message import edge_attention_backward, edge_attention_forward
from catmllm_kernels.escn.triton.scatter import rotate_back_sum_backward, rotate_back_sum_forward
from catmllm_kernels.escn.triton.tiles import TILES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

__all__ = [
    "DTYPES",
    "TILES",
    "edge_attention_backward",
    "edge_attention_forward",
    "rotate_back_sum_backward",
    "rotate_back_sum_forward",
]
