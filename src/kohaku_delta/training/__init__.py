"""Training: buckets, schedule, a visit as a function, conditioning, adapter, loss, the ordered sum, state, journal, loop."""
