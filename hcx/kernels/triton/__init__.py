"""GPU kernels for binary-coded weights, written in Triton; the one door to the package `triton`.

Importing this package imports neither triton nor CUDA: `backend` answers why it cannot serve, `layout` is plain
torch, and the kernels (`expand`, `forward`, `backward`) are imported by the first product. docs/gpu-kernels.md
explains the design.
"""
