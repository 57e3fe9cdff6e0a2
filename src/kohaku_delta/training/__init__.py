"""Training: buckets, schedule, batches, LoKr, optimizer, ordered gradient sum, journal, checkpoints."""
