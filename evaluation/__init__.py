"""Evaluate a policy in the LIBERO simulator."""
