"""The commands of kohaku-delta: a file a command."""
