"""Training: the round loop, the asynchronous loop, and the local training of a client."""
