"""One op a file: the maths, a plain PyTorch reference that defines it, a Triton kernel, an autograd function."""
