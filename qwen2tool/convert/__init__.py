"""Any checkpoint as a Qwen2, and a Qwen2 as something else: lossless, or refused."""
