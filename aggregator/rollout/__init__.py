"""Rollouts: how a version reaches the fleet in waves, and goes back when a gate fails. Pure."""
