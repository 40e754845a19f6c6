"""What happens around `fit`, and inside of its training step."""
