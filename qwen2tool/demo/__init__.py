"""The whole path on a small model, with a damaged copy as the counter-example."""
