"""What the commands in `scripts/` share: flags, run folders, the training loop, pictures, specifications, executors."""
