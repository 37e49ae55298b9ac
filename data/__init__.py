"""Read datasets of robot episodes."""
