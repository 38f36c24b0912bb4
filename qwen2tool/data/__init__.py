"""Records in, token ids with a loss mask out; shared by training and verification."""
