"""A checkpoint as files: geometry, tensor inventory, lazy reader, atomic sharded writer, adapter files.

Everything but `reader`, `load` and the arithmetic of `adapter` works without torch.
"""
