"""One module per method: what differs from `Client` and `Server`. Nothing imports this package; YAML names its classes."""
