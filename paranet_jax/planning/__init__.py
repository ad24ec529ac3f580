"""What a training step needs of devices that need not be here, from its compiled program."""
