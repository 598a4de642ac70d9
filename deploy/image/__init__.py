"""A minimal Debian arm64 image with Raspberry Pi OS's layout, and its virtual machine."""
