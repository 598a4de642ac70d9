"""The aggregator over HTTP: schemas that both ends share, the service's side, and where it listens."""
