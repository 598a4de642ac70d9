"""How the service is watched: metrics, logs and traces. Nothing here decides anything."""
