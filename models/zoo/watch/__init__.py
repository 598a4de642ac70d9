"""Files of the watch model: `model.tflite`, `weights.bin` and `manifest.json`."""
