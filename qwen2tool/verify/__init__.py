"""Are two checkpoints the same function? Inventory, tensors, logits, and a verdict by the reference's own noise."""
