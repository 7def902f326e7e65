"""Several processes that share one network: process group, tensor parallelism, replicated
engine."""
