"""The device: `covey-edge`."""

__version__ = "0.1.0"
