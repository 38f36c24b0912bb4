"""Pushing a checkpoint or a LoRA adapter to the Hub: plan, card, upload in one commit, read back.

`plan` touches no network and refuses what must not be published; `push` sends exactly the plan; huggingface_hub is
imported only where it is used.
"""
