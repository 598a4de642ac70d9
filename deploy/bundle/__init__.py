"""What a device runs, as one file: Covey's client and its packages; the device needs no pip."""
