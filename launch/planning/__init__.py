"""What a training step costs on a TPU, read from the program compiled for it."""
