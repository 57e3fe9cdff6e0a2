"""The recipe that rebuilds Kohaku XL Delta: one room a folder, data flows from `hub` to `checkpoint`."""
