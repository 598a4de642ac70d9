"""The demo: one machine plays broker, service and a fleet of devices, each its own process."""
