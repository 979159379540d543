"""Deformable sampling: kernels in Triton, and the ops that launch them."""
