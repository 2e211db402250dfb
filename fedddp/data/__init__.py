"""The data of a federation: datasets by name, their split over clients, and a client's batches."""
