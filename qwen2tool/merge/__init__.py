"""A LoRA adapter into its base: plan and check before the first byte, then one tensor at a time."""
