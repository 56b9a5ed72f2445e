"""The edge path of EquiformerV2 (eSCN): gather, rotate, SO(2) products, attention, rotate back, sum."""

from catmllm_kernels.escn.layout import EdgeAttention, EdgeGraph, Sphere, edge_graph
from catmllm_kernels.escn.op import edge_attention, rotate_back_sum

__all__ = ["EdgeAttention", "EdgeGraph", "Sphere", "edge_attention", "edge_graph", "rotate_back_sum"]
