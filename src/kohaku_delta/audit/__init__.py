"""What compares: files, tensors, journals, locks and hosts, with each other and with what was published."""
