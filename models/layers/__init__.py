"""Keras layers as builtin-only forward and backward forms. Needs TensorFlow: never imported on a device."""
