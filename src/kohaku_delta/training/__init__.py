"""LoKr training: buckets, schedule, batches, model, LoKr, optimizer, gradient reduction, journal, checkpoints."""
