"""What the server of a finished run could learn of the clients' images from what it received, by attacking it."""
