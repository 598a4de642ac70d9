"""What each command of `covey-edge` does: a process imports the module of its own command, and no other."""
