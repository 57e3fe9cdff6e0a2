"""What a stage leaves behind beside its outs: a record of what it read, wrote and ran on. No stage reads one."""
