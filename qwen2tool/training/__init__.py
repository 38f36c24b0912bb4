"""Settings, batches, losses, SFT and DPO on transformers.Trainer, and the report of a run."""
