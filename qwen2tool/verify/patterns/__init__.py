"""Known ways in which a checkpoint goes wrong, one kind a file, asked by `verify.diagnose`."""
