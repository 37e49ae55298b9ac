"""Convert, merge, assemble, upgrade and publish checkpoints."""
