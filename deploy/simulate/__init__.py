"""`covey simulate`: a campaign on simulated devices, before any real one spends its battery."""
