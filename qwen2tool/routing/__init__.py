"""What runs for each module of a model, and why; the fused layer, the memory plan, and how they come on a model."""
