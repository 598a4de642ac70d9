"""The devices: their certificates, and who is there."""
