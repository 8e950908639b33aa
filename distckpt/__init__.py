"""distckpt: the checkpoint manager for distributed PyTorch."""
