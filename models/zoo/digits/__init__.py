"""Files of the digits model: `model.tflite`, `weights.bin` and `manifest.json`."""
