"""Rounds: pure state machines and computations, and what the repository keeps of them."""
