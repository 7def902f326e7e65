"""A cluster: the gateway that clients talk to, and replicas of the model, by Ray Serve."""
