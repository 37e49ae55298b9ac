"""LoRA adapters: on a model, on disk, and the base model that each belongs to."""
