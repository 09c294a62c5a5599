"""One module for each method: what differs from `Client` and `Server`. Nobody imports it; YAML names its classes."""
