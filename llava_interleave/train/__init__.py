"""Training: data, packing, losses and one loop. Knows neither the engine nor servers."""
