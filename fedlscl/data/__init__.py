"""The data: what images there are, how they are split over clients and tasks, and batches of them."""
