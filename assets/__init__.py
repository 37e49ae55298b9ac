"""Data of the demonstration policies; ``openvla.inference.demo_policies`` finds them."""
