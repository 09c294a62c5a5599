"""A federation whose clients are elsewhere: shares of the data, a client on its own machine, and Flower."""
