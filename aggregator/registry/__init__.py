"""The models: artefacts by content, and signed versions."""
