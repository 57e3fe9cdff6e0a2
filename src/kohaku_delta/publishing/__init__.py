"""What a finished build publishes: the folder `release/`, the settings in other programs' forms, the upload."""
